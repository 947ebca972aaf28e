// Logits of one ONNX file by onnxruntime-node or onnxruntime-web, for runtimes.py: PACKAGE MODEL INPUTS TYPE SHAPE.
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { join } from "node:path";

const [packageName, model, inputs, type, shape] = process.argv.slice(2);
const require = createRequire(join(process.cwd(), "node_modules", "x.js"));
const loaded = require(packageName);
const ort = loaded.default ?? loaded;
const web = packageName === "onnxruntime-web";
if (web) ort.env.wasm.numThreads = 1;
const options = web ? { executionProviders: ["wasm"] } : { intraOpNumThreads: 1 };
const session = await ort.InferenceSession.create(web ? readFileSync(model) : model, options);
const bytes = new Uint8Array(readFileSync(inputs));
const data = type === "uint8" ? bytes : new Float32Array(bytes.buffer);
const input = new ort.Tensor(type, data, JSON.parse(shape));
const { logits } = await session.run({ input });
const version = require(join(process.cwd(), "node_modules", packageName, "package.json")).version;
console.log(JSON.stringify({ version, logits: Array.from(logits.data) }));
