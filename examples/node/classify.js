#!/usr/bin/env node
// Classify photos from Node.js: node classify.js [--top N] [--json] BUNDLE IMAGE...
import { readFile } from "node:fs/promises";
import { join } from "node:path";
import { parseArgs } from "node:util";
import ort from "onnxruntime-node";
import sharp from "sharp";
import { preprocess, ranked } from "../browser/preprocess.js";

/** A bundle of rkd-deploy, loaded once; `classify` gives the most probable classes of an image, best first. */
export class Classifier {
  static async load(bundle) {
    const card = JSON.parse(await readFile(join(bundle, "model.json"), "utf8"));
    if (!card.preprocess.embedded) {
      throw new Error(`${bundle} takes normalised floats; export it with --input uint8, so that the graph does that.`);
    }
    const session = await ort.InferenceSession.create(join(bundle, "model.onnx"));
    return new Classifier(session, card);
  }

  constructor(session, card) {
    this.session = session;
    this.card = card;
  }

  /** @param file A path, or a Buffer with the bytes of a JPEG, PNG, WebP, TIFF or GIF. */
  async classify(file, top = 5) {
    const { height, width, mean } = this.card.preprocess;
    const pixels = preprocess(await decoded(file), this.card.preprocess);
    const input = new ort.Tensor("uint8", pixels, [1, height, width, mean.length]);
    const { logits } = await this.session.run({ [this.session.inputNames[0]]: input }, ["logits"]);
    return ranked(logits.data, this.card.labels, top);
  }
}

/** Pixels upright by EXIF, colours as they are in the file: Pillow, which training decodes with, applies no profile. */
async function decoded(file) {
  const image = sharp(file, { ignoreIcc: true, autoOrient: true });
  const { depth } = await image.metadata();
  if (depth !== "uchar") throw new Error(`it has ${depth} samples, more than 8 bits per channel`);
  const { data, info } = await image.toColourspace("srgb").raw().toBuffer({ resolveWithObject: true });
  return { data, ...info };
}

async function main() {
  const { values, positionals } = parseArgs({
    allowPositionals: true,
    options: { top: { type: "string", default: "5" }, json: { type: "boolean", default: false } },
  });
  const [bundle, ...files] = positionals;
  if (!files.length) throw new Error("Usage: node classify.js [--top N] [--json] BUNDLE IMAGE...");
  const classifier = await Classifier.load(bundle);
  for (const file of files) {
    try {
      const predictions = await classifier.classify(file, Number(values.top));
      const words = predictions.map(({ label, probability }) => `${label} ${(100 * probability).toFixed(1)} %`);
      console.log(values.json ? JSON.stringify({ image: file, predictions }) : `${file}: ${words.join(", ")}`);
    } catch (error) {
      console.error(`${file} cannot be classified: ${error.message}`);
      process.exitCode = 1;
    }
  }
}

if (import.meta.main ?? process.argv[1]?.endsWith("classify.js")) {
  await main().catch((error) => {
    console.error(`Error: ${error.message}`);
    process.exitCode = 1;
  });
}
