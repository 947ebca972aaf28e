// Puts the page, a bundle and ONNX Runtime's wasm into one folder of static files: node build.js BUNDLE [SITE]
import { createHash } from "node:crypto";
import { copyFileSync, mkdirSync, readFileSync, writeFileSync } from "node:fs";
import { createRequire } from "node:module";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";

const [bundle, site = "site"] = process.argv.slice(2);
if (!bundle) {
  console.error("Usage: node build.js BUNDLE [SITE]");
  process.exit(2);
}
const here = dirname(fileURLToPath(import.meta.url));
const ort = dirname(createRequire(import.meta.url).resolve("onnxruntime-web"));

const sources = {
  ...Object.fromEntries(
    ["index.html", "style.css", "icon.svg", "app.js", "classifier.js", "preprocess.js"].map((name) => [name, join(here, name)]),
  ),
  ...Object.fromEntries(["model.onnx", "model.json"].map((name) => [name, join(bundle, name)])),
  ...Object.fromEntries(
    ["ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm"].map((name) => [`ort/${name}`, join(ort, name)]),
  ),
};

mkdirSync(join(site, "ort"), { recursive: true });
const hash = createHash("sha256");
for (const [name, source] of Object.entries(sources)) {
  copyFileSync(source, join(site, name));
  hash.update(name).update(readFileSync(source));
}
const worker = readFileSync(join(here, "offline.js"), "utf8")
  .replace('"unbuilt"', JSON.stringify(hash.digest("hex").slice(0, 16)))
  .replace("FILES = []", `FILES = ${JSON.stringify(["./", ...Object.keys(sources)])}`);
writeFileSync(join(site, "offline.js"), worker);
console.log(`${site}: static files; any web server does, e.g. python3 -m http.server --directory ${site}`);
