// The page: takes a photo or the camera's picture, asks the worker, shows the most probable classes as bars.

const at = (id) => document.getElementById(id);
const worker = new Worker(new URL("classifier.js", import.meta.url), { type: "module" });
const waiting = new Map(); // calls of the worker that are not answered yet, by number
let calls = 0;
let stream = null; // of the camera, while it is on

worker.onmessage = ({ data: { id, error, ...answer } }) => {
  const { resolve, reject } = waiting.get(id);
  waiting.delete(id);
  if (error) reject(new Error(error));
  else resolve(answer);
};
worker.onerror = (event) => fail(`The classifier has ended: ${event.message ?? "it could not be loaded"}.`);

/** What the worker answers; a picture is moved to it, not copied. */
function ask(message, moved = []) {
  return new Promise((resolve, reject) => {
    waiting.set(++calls, { resolve, reject });
    worker.postMessage({ id: calls, ...message }, moved);
  });
}

async function start() {
  keepForOffline();
  const { card } = await ask({ load: true });
  const accuracy = card.metrics?.accuracy;
  const known = typeof accuracy === "number" ? `, ${accuracy.toFixed(1)} % right on ${card.metrics.split ?? "test"} images` : "";
  at("model").textContent = `${card.name}: ${card.labels.length} classes${known}`;
  at("file").disabled = at("camera").disabled = false;
  document.body.dataset.ready = "yes";
}

async function classifyFile(file) {
  stopCamera();
  const former = at("photo").src;
  try {
    const answer = await ask({ image: file });
    at("photo").src = URL.createObjectURL(file);
    URL.revokeObjectURL(former);
    display("photo");
    show(answer);
  } catch (error) {
    fail(`${file.name || "The image"} cannot be classified: ${error.message}`);
  }
}

function show({ predictions, decodeMs, inferMs }) {
  at("error").hidden = true;
  at("answers").replaceChildren(
    ...predictions.map(({ label, probability }) => {
      const row = document.createElement("li");
      row.style.setProperty("--share", `${100 * probability}%`);
      for (const text of [label, `${(100 * probability).toFixed(1)} %`]) {
        row.append(Object.assign(document.createElement("span"), { textContent: text }));
      }
      row.dataset.probability = probability;
      return row;
    }),
  );
  at("times").textContent = `${decodeMs.toFixed(0)} ms to decode and resize, ${inferMs.toFixed(0)} ms to classify`;
}

function display(id) {
  for (const other of ["empty", "photo", "video"]) at(other).hidden = other !== id;
}

function fail(message) {
  at("error").textContent = message;
  at("error").hidden = false;
}

async function startCamera() {
  try {
    stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
  } catch (error) {
    fail(`The camera cannot be used: ${error.message}`);
    return;
  }
  const video = at("video");
  video.srcObject = stream;
  await video.play();
  display("video");
  at("camera").textContent = "Stop the camera";
  at("camera").setAttribute("aria-pressed", "true");
  const mine = stream;
  while (stream === mine) {
    // The next picture is taken when the last is answered, so a slow device shows fewer and never lags.
    const picture = await createImageBitmap(video);
    const answer = await ask({ image: picture }, [picture]).catch((error) => fail(error.message));
    if (answer && stream === mine) show(answer);
    await new Promise(requestAnimationFrame);
  }
}

function stopCamera() {
  if (!stream) return;
  for (const track of stream.getTracks()) track.stop();
  stream = null;
  at("camera").textContent = "Use the camera";
  at("camera").setAttribute("aria-pressed", "false");
  display("empty");
}

/** Let the service worker keep every file, the model too: after the first visit the page works without a network. */
async function keepForOffline() {
  if (!("serviceWorker" in navigator)) return; // a page that is neither on https nor on localhost has none
  await navigator.serviceWorker.register(new URL("offline.js", import.meta.url), { type: "module" });
  await navigator.serviceWorker.ready;
  at("offline").textContent = "It works offline now.";
}

at("file").onchange = ({ target }) => {
  if (target.files.length) classifyFile(target.files[0]);
  target.value = ""; // so that the same file can be chosen again
};
at("camera").onclick = () => (stream ? stopCamera() : startCamera());

let entered = 0; // dragenter and dragleave come for every element inside too
addEventListener("dragenter", () => document.body.classList.toggle("dropping", ++entered > 0));
addEventListener("dragleave", () => document.body.classList.toggle("dropping", --entered > 0));
addEventListener("dragover", (event) => event.preventDefault());
addEventListener("drop", (event) => {
  event.preventDefault();
  entered = 0;
  document.body.classList.remove("dropping");
  if (event.dataTransfer.files.length) classifyFile(event.dataTransfer.files[0]);
});
addEventListener("paste", ({ clipboardData }) => {
  if (clipboardData.files.length) classifyFile(clipboardData.files[0]);
});

start().catch((error) => {
  at("model").textContent = "The model could not be loaded.";
  fail(error.message);
});
