// Decoded and resized pixels by Node.js, for preprocessing.py: PREPROCESS RULE.json PHOTO...; writes beside each photo.
import { readFileSync, writeFileSync } from "node:fs";
import { createRequire } from "node:module";
import { join } from "node:path";
import { pathToFileURL } from "node:url";

const [script, ruleFile, ...photos] = process.argv.slice(2);
const require = createRequire(join(process.cwd(), "node_modules", "x.js"));
const sharp = require("sharp");
const { preprocess, resizedSize } = await import(pathToFileURL(script));
const rule = JSON.parse(readFileSync(ruleFile));
for (const photo of photos) {
  const image = () => sharp(photo, { ignoreIcc: true }).toColourspace("srgb");
  const { data, info } = await image().raw().toBuffer({ resolveWithObject: true });
  writeFileSync(`${photo}.decoded`, data);
  writeFileSync(`${photo}.preprocess`, preprocess({ data, ...info }, rule));
  const size = resizedSize(info, rule);
  // A half goes to the even neighbour, as in the rule: only the resize is to differ.
  const middle = (room) => (room % 4 === 3 ? (room + 1) / 2 : Math.floor(room / 2));
  const [left, top] = [middle(size.width - rule.width), middle(size.height - rule.height)];
  const window = { left, top, width: rule.width, height: rule.height };
  const resized = image().resize({ ...size, fit: "fill", kernel: "linear" }).extract(window);
  writeFileSync(`${photo}.sharp`, await resized.raw().toBuffer());
}
console.log(JSON.stringify({ sharp: sharp.versions.sharp }));
