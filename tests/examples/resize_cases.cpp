// Runs preprocess.hpp on cases of pixels for test_preprocess.py: CASES.txt; writes NAME.out beside NAME.
#include <fstream>
#include <iterator>

#include "preprocess.hpp"

int main(int, char** arguments) {
  std::ifstream cases(arguments[1]);
  std::string file;
  rkd::Image image;
  rkd::Preprocess rule;
  image.channels = 3;
  while (cases >> file >> image.width >> image.height >> rule.height >> rule.width >> rule.channels >>
         rule.interpolation >> rule.crop_fraction) {
    std::ifstream pixels(file, std::ios::binary);
    image.data.assign(std::istreambuf_iterator<char>(pixels), {});
    const auto result = rkd::preprocess(image, rule);
    std::ofstream(file + ".out", std::ios::binary)
        .write(reinterpret_cast<const char*>(result.data.data()), static_cast<std::streamsize>(result.data.size()));
  }
}
