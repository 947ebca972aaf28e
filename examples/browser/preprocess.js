// From decoded pixels to the input of an exported model, byte for byte as Pillow does it in training.
//
// Other libraries' "bilinear" and "bicubic" are not Pillow's: most sample without anti-aliasing, and those that do round
// otherwise. So this is Pillow's own algorithm (src/libImaging/Resample.c of Pillow 13): two passes, across and down, each
// with weights in fixed point. The weights are computed in doubles, as there, so both have the same bits.

const PRECISION_BITS = 32 - 8 - 2; // of a weight: 8 bits are the pixel's, 2 the room for a sum beyond 0 .. 255
const HALF = 1 << (PRECISION_BITS - 1);

const FILTERS = {
  bilinear: { support: 1, weight: (x) => Math.max(0, 1 - Math.abs(x)) },
  bicubic: { support: 2, weight: cubic },
};

/** Keys' cubic convolution with a = -0.5. */
function cubic(x) {
  const a = -0.5;
  x = Math.abs(x);
  if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
  return x < 2 ? (((x - 5) * x + 8) * x - 4) * a : 0;
}

/**
 * One image as a model takes it: resized until its crop fits, shorter side first, cropped at the centre.
 *
 * @param {{data: Uint8Array | Uint8ClampedArray, width: number, height: number, channels: number}} image Upright, with
 *   1 (grey), 3 (RGB) or 4 channels (transparency is dropped).
 * @param {{height: number, width: number, mean: number[], interpolation: string, crop_fraction: number,
 *   embedded: boolean}} rule `preprocess` of model.json.
 * @returns {Uint8Array} [height, width, channels] of the model.
 */
export function preprocess(image, rule) {
  const { width, height } = rule;
  const source = rule.mean.length === 1 ? grey(image) : image;
  const size = resizedSize(source, rule);
  const left = roundHalfEven((size.width - width) / 2);
  const top = roundHalfEven((size.height - height) / 2);
  const pixels = resize(source, size, rule.interpolation, { left, top, width, height });
  const repeats = (width * height * rule.mean.length) / pixels.length; // 3 where a grey image is for a model of colours
  return repeats === 1 ? pixels : Uint8Array.from({ length: pixels.length * repeats }, (_, i) => pixels[Math.trunc(i / repeats)]);
}

/** Width and height after resizing: one side exact, the other rounded down, as torchvision's Resize does. */
export function resizedSize({ width, height }, rule) {
  const wide = roundHalfEven(rule.width / rule.crop_fraction);
  const high = roundHalfEven(rule.height / rule.crop_fraction);
  return width * high <= height * wide
    ? { width: wide, height: Math.max(high, Math.floor((wide * height) / width)) }
    : { width: Math.max(wide, Math.floor((high * width) / height)), height: high };
}

/**
 * The part of a resized image that a window shows; what lies outside is not computed.
 *
 * @param image As for `preprocess`, with 1 or 3 channels.
 * @param size Width and height of the whole image after resizing.
 * @param interpolation "nearest", "bilinear" or "bicubic".
 * @param window left, top, width and height in the resized image. Default: all of it.
 */
export function resize(image, size, interpolation, window = { left: 0, top: 0, ...size }) {
  const across = { from: image.width, to: size.width, first: window.left, count: window.width };
  const down = { from: image.height, to: size.height, first: window.top, count: window.height };
  if (interpolation === "nearest") return nearest(image, across, down);
  const filter = FILTERS[interpolation];
  if (!filter) throw new Error(`Unknown interpolation ${interpolation}; it must be nearest, bilinear or bicubic.`);
  const [columns, rows] = [weights(across, filter), weights(down, filter)];
  // Pillow's order since version 13, and each pass rounds: of an image that shrinks far more in height, down comes first.
  const [narrower, lower] = [image.width - size.width, image.height - size.height];
  return lower > 0 && lower > 2 * narrower
    ? passAcross(passDown(image, rows, columns), columns).data
    : passDown(passAcross(image, columns, rows), rows).data;
}

/** For each pixel of one side of the window: where its first source pixel is, and the weight of each. */
function weights({ from, to, first, count }, filter) {
  const scale = from / to;
  const stretch = Math.max(1, scale); // a smaller image averages over as many pixels as become one: anti-aliasing
  const support = filter.support * stretch;
  const rows = [];
  for (let position = first; position < first + count; position++) {
    if (from === to) {
      rows.push({ start: position, fixed: [1 << PRECISION_BITS] }); // Pillow leaves such a side as it is
      continue;
    }
    const centre = (position + 0.5) * scale;
    const start = Math.max(0, Math.trunc(centre - support + 0.5));
    const end = Math.min(from, Math.trunc(centre + support + 0.5));
    const exact = [];
    let sum = 0;
    for (let x = start; x < end; x++) {
      const weight = filter.weight((x - centre + 0.5) * (1 / stretch));
      exact.push(weight);
      sum += weight;
    }
    const fixed = exact.map((weight) => {
      const scaled = (sum === 0 ? weight : weight / sum) * (1 << PRECISION_BITS);
      return Math.trunc(scaled < 0 ? scaled - 0.5 : scaled + 0.5);
    });
    rows.push({ start, fixed });
  }
  return rows;
}

/** Resize in width those rows that `rows` will read (default: all). Transparency is dropped. */
function passAcross(image, columns, rows) {
  const { data, width, channels } = image;
  const kept = Math.min(channels, 3);
  const result = new Uint8Array(image.height * columns.length * kept);
  const [first, end] = rows ? span(rows) : [0, image.height];
  for (let y = first; y < end; y++) {
    let place = y * columns.length * kept;
    for (const { start, fixed } of columns) {
      const origin = (y * width + start) * channels;
      for (let channel = 0; channel < kept; channel++) {
        let sum = HALF;
        for (let k = 0; k < fixed.length; k++) sum += data[origin + k * channels + channel] * fixed[k];
        result[place++] = clipped(sum);
      }
    }
  }
  return { data: result, width: columns.length, height: image.height, channels: kept };
}

/** Resize in height those columns that `columns` will read (default: all). Transparency is dropped. */
function passDown(image, rows, columns) {
  const { data, width, channels } = image;
  const kept = Math.min(channels, 3);
  const result = new Uint8Array(rows.length * width * kept);
  const [first, end] = columns ? span(columns) : [0, width];
  rows.forEach(({ start, fixed }, y) => {
    let place = (y * width + first) * kept;
    for (let x = first; x < end; x++) {
      const origin = (start * width + x) * channels;
      for (let channel = 0; channel < kept; channel++) {
        let sum = HALF;
        for (let k = 0; k < fixed.length; k++) sum += data[origin + k * width * channels + channel] * fixed[k];
        result[place++] = clipped(sum);
      }
    }
  });
  return { data: result, width, height: rows.length, channels: kept };
}

/** The first source pixel that weights read, and the one behind the last. */
function span(positions) {
  const last = positions.at(-1);
  return [positions[0].start, last.start + last.fixed.length];
}

function clipped(sum) {
  const value = sum >> PRECISION_BITS;
  return value < 0 ? 0 : value > 255 ? 255 : value;
}

function nearest({ data, width, channels }, across, down) {
  const kept = Math.min(channels, 3);
  const columns = nearestPositions(across);
  const result = new Uint8Array(down.count * across.count * kept);
  let place = 0;
  for (const y of nearestPositions(down)) {
    for (const x of columns) {
      for (let channel = 0; channel < kept; channel++) result[place++] = data[(y * width + x) * channels + channel];
    }
  }
  return result;
}

function nearestPositions({ from, to, first, count }) {
  const positions = [];
  let position = (from / to) * 0.5;
  for (let index = 0; index < first + count; index++) {
    if (index >= first) positions.push(Math.trunc(position));
    position += from / to; // added up, as Pillow does: multiplied, it would be rounded otherwise
  }
  return positions;
}

/** An image of one channel: ITU-R 601-2 luma, as Pillow's convert("L"). */
function grey({ data, width, height, channels }) {
  if (channels === 1) return { data, width, height, channels };
  const result = new Uint8Array(width * height);
  for (let pixel = 0, at = 0; pixel < result.length; pixel++, at += channels) {
    result[pixel] = (data[at] * 19595 + data[at + 1] * 38470 + data[at + 2] * 7471 + 0x8000) >> 16;
  }
  return { data: result, width, height, channels: 1 };
}

/** Python's round: a half goes to the even neighbour. */
function roundHalfEven(value) {
  const down = Math.floor(value);
  if (value - down !== 0.5) return Math.round(value);
  return down % 2 === 0 ? down : down + 1;
}

/** The most probable classes by a model's logits, best first. */
export function ranked(logits, labels, top = 5) {
  const peak = Math.max(...logits);
  if (!Number.isFinite(peak)) throw new Error(`The model's largest logit is ${peak}; it must be finite.`);
  const exponentials = Array.from(logits, (logit) => Math.exp(logit - peak));
  const total = exponentials.reduce((sum, value) => sum + value, 0);
  return exponentials
    .map((value, index) => ({ label: labels[index], probability: value / total, index }))
    .sort((one, other) => other.probability - one.probability || one.index - other.index)
    .slice(0, top);
}
