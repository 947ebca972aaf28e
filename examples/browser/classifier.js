// The worker: decodes, resizes and classifies beside the page, which stays free meanwhile.
import * as ort from "./ort/ort.wasm.bundle.min.mjs";
import { preprocess, ranked } from "./preprocess.js";

ort.env.wasm.wasmPaths = { wasm: new URL("ort/ort-wasm-simd-threaded.wasm", import.meta.url).href };
ort.env.wasm.numThreads = 1; // more need SharedArrayBuffer, and with it headers that not every static host sends

const loading = load();

async function load() {
  const fetched = async (name) => {
    const response = await fetch(new URL(name, import.meta.url));
    if (!response.ok) throw new Error(`${name} cannot be fetched: ${response.status} ${response.statusText}`);
    return response;
  };
  const card = await (await fetched("model.json")).json();
  if (!card.preprocess.embedded) {
    throw new Error("The model takes normalised floats; export it with --input uint8, so that the graph does that.");
  }
  const model = new Uint8Array(await (await fetched("model.onnx")).arrayBuffer());
  return { card, session: await ort.InferenceSession.create(model, { executionProviders: ["wasm"] }) };
}

/** @param image A Blob with a JPEG, PNG, WebP .., or an ImageBitmap. */
async function classify(image) {
  const { card, session } = await loading;
  const begun = performance.now();
  const { height, width, mean } = card.preprocess;
  const pixels = preprocess(await decoded(image), card.preprocess);
  const ready = performance.now();
  const input = new ort.Tensor("uint8", pixels, [1, height, width, mean.length]);
  const { logits } = await session.run({ [session.inputNames[0]]: input }, ["logits"]);
  const done = performance.now();
  return { predictions: ranked(logits.data, card.labels), decodeMs: ready - begun, inferMs: done - ready };
}

/** RGBA upright by EXIF, colours as they are in the file: Pillow, which training decodes with, applies no profile. */
async function decoded(image) {
  const rules = { imageOrientation: "from-image", colorSpaceConversion: "none", premultiplyAlpha: "none" };
  const bitmap = image instanceof ImageBitmap ? image : await createImageBitmap(image, rules);
  const { width, height } = bitmap;
  const context = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
  context.drawImage(bitmap, 0, 0);
  bitmap.close();
  return { data: context.getImageData(0, 0, width, height).data, width, height, channels: 4 };
}

onmessage = async ({ data: { id, image } }) => {
  try {
    postMessage({ id, ...(image ? await classify(image) : { card: (await loading).card }) });
  } catch (error) {
    postMessage({ id, error: error.message });
  }
};
