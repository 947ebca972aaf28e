// Runs preprocess.js on cases of pixels for test_preprocess.py: PREPROCESS CASES.json; writes NAME.out beside NAME.
import { readFileSync, writeFileSync } from "node:fs";
import { pathToFileURL } from "node:url";

const [script, cases] = process.argv.slice(2);
const { preprocess } = await import(pathToFileURL(script));
for (const { file, width, height, channels, rule } of JSON.parse(readFileSync(cases))) {
  const data = new Uint8Array(readFileSync(file));
  writeFileSync(`${file}.out`, preprocess({ data, width, height, channels }, rule));
}
