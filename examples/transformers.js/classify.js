#!/usr/bin/env node
// Classify photos with Transformers.js: node classify.js [--as-is] [--json] FOLDER IMAGE...
//
// FOLDER is what `rkd-deploy export BUNDLE --format transformers-js` wrote. Transformers.js resizes without antialiasing,
// and its probabilities are off by a few hundredths for that. So the photo is resized here, as in training, and the
// processor only has to make a tensor of it; with --as-is everything is left to Transformers.js.
import { readFile } from "node:fs/promises";
import { basename, dirname, join, resolve } from "node:path";
import { parseArgs } from "node:util";
import { RawImage, env, pipeline } from "@huggingface/transformers";
import { preprocess } from "../browser/preprocess.js";

const { values, positionals } = parseArgs({
  allowPositionals: true,
  options: { "as-is": { type: "boolean", default: false }, json: { type: "boolean", default: false } },
});
const [folder, ...files] = positionals;
if (!files.length) {
  console.error("Usage: node classify.js [--as-is] [--json] FOLDER IMAGE...");
  process.exit(2);
}

env.allowRemoteModels = false;
env.localModelPath = dirname(resolve(folder));
const classify = await pipeline("image-classification", basename(resolve(folder)), { dtype: "fp32" });

const config = JSON.parse(await readFile(join(folder, "preprocessor_config.json"), "utf8"));
const { height, width } = config.crop_size;
const rule = {
  height,
  width,
  mean: config.image_mean,
  interpolation: { 0: "nearest", 2: "bilinear", 3: "bicubic" }[config.resample],
  crop_fraction: height / config.size.shortest_edge,
};
if (!values["as-is"]) Object.assign(classify.processor.image_processor, { do_resize: false, do_center_crop: false });

for (const file of files) {
  try {
    let image = await RawImage.read(file);
    if (!values["as-is"]) image = new RawImage(preprocess(image, rule), width, height, 3);
    const answers = await classify(image, { top_k: 5 });
    const predictions = answers.map(({ label, score }) => ({ label, probability: score }));
    const words = predictions.map(({ label, probability }) => `${label} ${(100 * probability).toFixed(1)} %`);
    console.log(values.json ? JSON.stringify({ image: file, predictions }) : `${file}: ${words.join(", ")}`);
  } catch (error) {
    console.error(`${file} cannot be classified: ${error.message}`);
    process.exitCode = 1;
  }
}
