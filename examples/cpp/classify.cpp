// Classify photos in C++: classify BUNDLE PHOTO.jpg...
#include <algorithm>
#include <cmath>
#include <fstream>
#include <iomanip>
#include <iostream>
#include <numeric>

#include <nlohmann/json.hpp>
#include <openvino/openvino.hpp>

#include "jpeg.hpp"
#include "preprocess.hpp"

namespace {

struct Prediction {
  std::string label;
  double probability;
};

/// A bundle of rkd-deploy, loaded once.
class Classifier {
 public:
  explicit Classifier(const std::string& bundle) {
    std::ifstream file(bundle + "/model.json");
    if (!file) throw std::runtime_error(bundle + " holds no model.json.");
    const auto card = nlohmann::json::parse(file);
    const auto& rule = card.at("preprocess");
    if (!rule.at("embedded").get<bool>()) {
      throw std::runtime_error(bundle + " takes normalised floats; export it with --input uint8.");
    }
    labels_ = card.at("labels").get<std::vector<std::string>>();
    rule_.height = rule.at("height");
    rule_.width = rule.at("width");
    rule_.channels = static_cast<int>(rule.at("mean").size());
    rule_.interpolation = rule.at("interpolation");
    rule_.crop_fraction = rule.at("crop_fraction");
    // On CPUs that have it OpenVINO would compute in bfloat16, and be two digits less exact.
    const auto exact = ov::hint::inference_precision(ov::element::f32);
    request_ = core_.compile_model(bundle + "/model.onnx", "CPU", exact).create_infer_request();
  }

  /// The most probable classes, best first.
  std::vector<Prediction> classify(const rkd::Image& image, std::size_t top = 5) {
    auto pixels = rkd::preprocess(image, rule_);
    const ov::Shape shape{1, std::size_t(rule_.height), std::size_t(rule_.width), std::size_t(rule_.channels)};
    request_.set_input_tensor(ov::Tensor(ov::element::u8, shape, pixels.data.data()));
    request_.infer();
    const float* logits = request_.get_tensor("logits").data<float>();
    const std::size_t count = labels_.size();
    const double peak = *std::max_element(logits, logits + count);
    double total = 0;
    for (std::size_t k = 0; k < count; ++k) total += std::exp(logits[k] - peak);
    std::vector<std::size_t> order(count);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](auto one, auto other) { return logits[one] > logits[other]; });
    std::vector<Prediction> best;
    for (std::size_t k = 0; k < std::min(top, count); ++k) {
      best.push_back({labels_[order[k]], std::exp(logits[order[k]] - peak) / total});
    }
    return best;
  }

 private:
  ov::Core core_;
  ov::InferRequest request_;
  rkd::Preprocess rule_;
  std::vector<std::string> labels_;
};

}  // namespace

int main(int count, char** arguments) {
  if (count < 3) {
    std::cerr << "Usage: classify BUNDLE PHOTO.jpg...\n";
    return 2;
  }
  int code = 0;
  try {
    Classifier classifier(arguments[1]);
    for (int index = 2; index < count; ++index) {
      try {
        const auto best = classifier.classify(rkd::read_jpeg(arguments[index]));
        std::cout << arguments[index];
        for (const auto& [label, probability] : best) {
          std::cout << (label == best[0].label ? ": " : ", ") << label << ' ' << std::fixed << std::setprecision(3)
                    << 100 * probability << " %";
        }
        std::cout << '\n';
      } catch (const std::runtime_error& error) {
        std::cerr << arguments[index] << " cannot be classified: " << error.what() << '\n';
        code = 1;
      }
    }
  } catch (const std::exception& error) {
    std::cerr << "Error: " << error.what() << '\n';
    return 1;
  }
  return code;
}
