// Decodes a JPEG file to upright RGB by libjpeg, as Pillow does: no colour profile is applied.
#pragma once

#include <cstdio>  // before jpeglib.h, which needs FILE

#include <jpeglib.h>

#include <algorithm>
#include <array>
#include <initializer_list>
#include <memory>
#include <stdexcept>
#include <string>

#include "preprocess.hpp"

namespace rkd {

namespace detail {

/// libjpeg ends the process on an error unless this leaves it. Where C code has no unwind tables (not x86-64 or ARM64),
/// setjmp and longjmp must take the place of this exception.
[[noreturn]] inline void raise(j_common_ptr decoder) {
  std::array<char, JMSG_LENGTH_MAX> message{};
  decoder->err->format_message(decoder, message.data());
  throw std::runtime_error(message.data());
}

/// How the camera was held, 1 (upright) to 8, from the Exif block of the file; 1 where it does not say.
inline int orientation(const jpeg_decompress_struct& decoder) {
  for (auto marker = decoder.marker_list; marker != nullptr; marker = marker->next) {
    const std::uint8_t* exif = marker->data;
    const std::size_t size = marker->data_length;
    if (size < 20 || std::string(exif, exif + 4) != "Exif") continue;
    const std::uint8_t* tiff = exif + 6;  // offsets count from here
    const std::size_t length = size - 6;
    const bool little = tiff[0] == 'I';
    const auto number = [&](std::size_t at, int bytes) {
      std::size_t value = 0;
      for (int k = 0; k < bytes; ++k) value |= std::size_t(tiff[at + k]) << 8 * (little ? k : bytes - 1 - k);
      return value;
    };
    const std::size_t directory = number(4, 4);
    if (directory + 2 > length) return 1;
    for (std::size_t entry = 0; entry < number(directory, 2); ++entry) {
      const std::size_t at = directory + 2 + 12 * entry;
      if (at + 12 > length) return 1;
      if (number(at, 2) == 0x0112) return number(at + 8, 2) <= 8 ? static_cast<int>(number(at + 8, 2)) : 1;
    }
  }
  return 1;
}

inline Image upright(const Image& image, int orientation) {
  if (orientation < 2) return image;
  const auto is_any_of = [=](std::initializer_list<int> some) { return std::ranges::count(some, orientation) > 0; };
  const bool turned = orientation > 4, mirrored_x = is_any_of({2, 3, 7, 8}), mirrored_y = is_any_of({3, 4, 6, 7});
  Image result{turned ? image.height : image.width, turned ? image.width : image.height, 3, {}};
  result.data.reserve(image.data.size());
  for (int y = 0; y < result.height; ++y) {
    for (int x = 0; x < result.width; ++x) {
      const int column = turned ? y : x, row = turned ? x : y;
      const int from_x = mirrored_x ? image.width - 1 - column : column;
      const int from_y = mirrored_y ? image.height - 1 - row : row;
      const auto pixel = image.data.begin() + (std::ptrdiff_t(from_y) * image.width + from_x) * 3;
      result.data.insert(result.data.end(), pixel, pixel + 3);
    }
  }
  return result;
}

}  // namespace detail

/// @throws std::runtime_error The file is missing, broken, no JPEG, or in colours for print (CMYK).
inline Image read_jpeg(const std::string& path) {
  const std::unique_ptr<std::FILE, int (*)(std::FILE*)> file(std::fopen(path.c_str(), "rb"), std::fclose);
  if (!file) throw std::runtime_error("it cannot be opened");
  jpeg_decompress_struct decoder{};
  jpeg_error_mgr errors{};
  decoder.err = jpeg_std_error(&errors);
  errors.error_exit = detail::raise;
  errors.emit_message = [](j_common_ptr decoder, int level) {
    if (level < 0) detail::raise(decoder);  // a truncated file is a warning to libjpeg, which would fill it with grey
  };
  jpeg_create_decompress(&decoder);
  const std::unique_ptr<jpeg_decompress_struct, void (*)(j_decompress_ptr)> freed(&decoder, jpeg_destroy_decompress);
  jpeg_stdio_src(&decoder, file.get());
  jpeg_save_markers(&decoder, JPEG_APP0 + 1, 0xFFFF);
  jpeg_read_header(&decoder, TRUE);
  if (decoder.num_components == 4) throw std::runtime_error("it has colours for print (CMYK)");
  const int orientation = detail::orientation(decoder);  // now: the markers go when the decoder is done
  decoder.out_color_space = JCS_RGB;
  jpeg_start_decompress(&decoder);
  Image image{static_cast<int>(decoder.output_width), static_cast<int>(decoder.output_height), 3, {}};
  image.data.resize(std::size_t(image.width) * image.height * 3);
  while (decoder.output_scanline < decoder.output_height) {
    JSAMPROW row = &image.data[std::size_t(decoder.output_scanline) * image.width * 3];
    jpeg_read_scanlines(&decoder, &row, 1);
  }
  jpeg_finish_decompress(&decoder);
  return detail::upright(image, orientation);
}

}  // namespace rkd
