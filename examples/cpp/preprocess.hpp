// From decoded pixels to the input of an exported model, byte for byte as Pillow does it in training.
//
// Other libraries' "bilinear" and "bicubic" are not Pillow's: OpenCV's and OpenVINO's sample without anti-aliasing. So this
// is Pillow's own algorithm (src/libImaging/Resample.c of Pillow 13): two passes, across and down, each with weights in
// fixed point. Compile with -ffp-contract=off, so that the weights have the same bits.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace rkd {

struct Image {
  int width = 0, height = 0, channels = 0;  // 3: RGB, 1: grey
  std::vector<std::uint8_t> data;           // [height, width, channels]
};

/// `preprocess` of a bundle's model.json.
struct Preprocess {
  int height = 0, width = 0, channels = 3;
  std::string interpolation = "bilinear";
  double crop_fraction = 1;
};

namespace detail {

constexpr int kPrecisionBits = 32 - 8 - 2;  // of a weight: 8 bits are the pixel's, 2 the room for a sum beyond 0 .. 255

inline double bilinear(double x) { return std::max(0.0, 1.0 - std::fabs(x)); }

inline double bicubic(double x) {  // Keys' cubic convolution
  constexpr double a = -0.5;
  x = std::fabs(x);
  if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
  return x < 2 ? (((x - 5) * x + 8) * x - 4) * a : 0;
}

struct Filter {
  double support;
  double (*weight)(double);
};

/// One side of the resized image, and the part of it that a window shows.
struct Side {
  int from, to, first, count;
};

/// Where the source pixels of one result are, and the weight of each.
struct Position {
  int start;
  std::vector<std::int32_t> weights;
};

inline std::vector<Position> positions(const Side& side, const Filter& filter) {
  const double scale = static_cast<double>(side.from) / side.to;
  const double stretch = std::max(1.0, scale);  // a smaller image averages what becomes one pixel: anti-aliasing
  const double support = filter.support * stretch;
  std::vector<Position> result;
  for (int place = side.first; place < side.first + side.count; ++place) {
    if (side.from == side.to) {
      result.push_back({place, {1 << kPrecisionBits}});  // Pillow leaves such a side as it is
      continue;
    }
    const double centre = (place + 0.5) * scale;
    const int start = std::max(0, static_cast<int>(centre - support + 0.5));
    const int end = std::min(side.from, static_cast<int>(centre + support + 0.5));
    std::vector<double> exact;
    double sum = 0;
    for (int x = start; x < end; ++x) {
      exact.push_back(filter.weight((x - centre + 0.5) * (1.0 / stretch)));
      sum += exact.back();
    }
    Position position{start, {}};
    for (double weight : exact) {
      const double scaled = (sum == 0 ? weight : weight / sum) * (1 << kPrecisionBits);
      position.weights.push_back(static_cast<std::int32_t>(scaled < 0 ? scaled - 0.5 : scaled + 0.5));
    }
    result.push_back(std::move(position));
  }
  return result;
}

inline std::uint8_t clipped(std::int32_t sum) {
  return static_cast<std::uint8_t>(std::clamp(sum >> kPrecisionBits, 0, 255));
}

inline Image pass_across(const Image& image, const std::vector<Position>& columns) {
  Image result{static_cast<int>(columns.size()), image.height, image.channels, {}};
  result.data.reserve(std::size_t(result.width) * result.height * result.channels);
  for (int y = 0; y < image.height; ++y) {
    for (const auto& [start, weights] : columns) {
      const std::uint8_t* source = &image.data[(std::size_t(y) * image.width + start) * image.channels];
      for (int channel = 0; channel < image.channels; ++channel) {
        std::int32_t sum = 1 << (kPrecisionBits - 1);
        for (std::size_t k = 0; k < weights.size(); ++k) sum += source[k * image.channels + channel] * weights[k];
        result.data.push_back(clipped(sum));
      }
    }
  }
  return result;
}

inline Image pass_down(const Image& image, const std::vector<Position>& rows) {
  Image result{image.width, static_cast<int>(rows.size()), image.channels, {}};
  const std::size_t stride = std::size_t(image.width) * image.channels;
  result.data.reserve(stride * result.height);
  for (const auto& [start, weights] : rows) {
    const std::uint8_t* source = &image.data[start * stride];
    for (std::size_t column = 0; column < stride; ++column) {
      std::int32_t sum = 1 << (kPrecisionBits - 1);
      for (std::size_t k = 0; k < weights.size(); ++k) sum += source[k * stride + column] * weights[k];
      result.data.push_back(clipped(sum));
    }
  }
  return result;
}

inline std::vector<int> nearest_positions(const Side& side) {
  std::vector<int> result;
  const double scale = static_cast<double>(side.from) / side.to;
  double position = scale * 0.5;
  for (int index = 0; index < side.first + side.count; ++index) {
    if (index >= side.first) result.push_back(static_cast<int>(position));
    position += scale;  // added up, as Pillow does: multiplied, it would be rounded otherwise
  }
  return result;
}

inline Image nearest(const Image& image, const Side& across, const Side& down) {
  Image result{across.count, down.count, image.channels, {}};
  for (int y : nearest_positions(down)) {
    for (int x : nearest_positions(across)) {
      const auto source = image.data.begin() + (std::ptrdiff_t(y) * image.width + x) * image.channels;
      result.data.insert(result.data.end(), source, source + image.channels);
    }
  }
  return result;
}

inline Image resized(const Image& image, const Side& across, const Side& down, const std::string& interpolation) {
  if (interpolation == "nearest") return nearest(image, across, down);
  if (interpolation != "bilinear" && interpolation != "bicubic") {
    throw std::invalid_argument("Unknown interpolation " + interpolation + ".");
  }
  const Filter filter = interpolation == "bilinear" ? Filter{1, bilinear} : Filter{2, bicubic};
  const auto columns = positions(across, filter), rows = positions(down, filter);
  // Pillow's order since version 13, and each pass rounds: of an image that shrinks far more in height, down comes first.
  const int narrower = across.from - across.to, lower = down.from - down.to;
  return lower > 0 && lower > 2 * narrower ? pass_across(pass_down(image, rows), columns)
                                           : pass_down(pass_across(image, columns), rows);
}

/// Python's round: a half goes to the even neighbour, which is how floating point rounds unless told otherwise.
inline int round_half_even(double value) { return static_cast<int>(std::nearbyint(value)); }

inline Image grey(const Image& image) {  // ITU-R 601-2 luma, Pillow's convert("L")
  Image result{image.width, image.height, 1, {}};
  for (std::size_t at = 0; at < image.data.size(); at += 3) {
    const auto* rgb = &image.data[at];
    result.data.push_back(static_cast<std::uint8_t>((rgb[0] * 19595 + rgb[1] * 38470 + rgb[2] * 7471 + 0x8000) >> 16));
  }
  return result;
}

}  // namespace detail

/// One upright RGB image as a model takes it: resized until its crop fits, shorter side first, cropped at the centre.
inline Image preprocess(const Image& image, const Preprocess& rule) {
  const Image& source = rule.channels == 1 ? detail::grey(image) : image;
  const auto wide = detail::round_half_even(rule.width / rule.crop_fraction);
  const auto high = detail::round_half_even(rule.height / rule.crop_fraction);
  int width = wide, height = high;  // one side exact, the other rounded down, as torchvision's Resize does
  if (std::int64_t(source.width) * high <= std::int64_t(source.height) * wide) {
    height = std::max(high, static_cast<int>(double(wide) * source.height / source.width));
  } else {
    width = std::max(wide, static_cast<int>(double(high) * source.width / source.height));
  }
  const detail::Side across{source.width, width, detail::round_half_even((width - rule.width) / 2.0), rule.width};
  const detail::Side down{source.height, height, detail::round_half_even((height - rule.height) / 2.0), rule.height};
  return detail::resized(source, across, down, rule.interpolation);
}

}  // namespace rkd
