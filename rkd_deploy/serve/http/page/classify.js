// Sends an image to the server that this page came from, and draws what it answers. No library, no build step.

const at = (id) => document.getElementById(id);
const [drop, file, preview, video] = ["drop", "file", "preview", "video"].map(at);
let asked = 0; // of several requests under way, the last one's answer is shown

async function classify(image) {
  const number = ++asked;
  stopCamera();
  URL.revokeObjectURL(preview.src);
  preview.src = URL.createObjectURL(image);
  preview.hidden = false;
  at("hint").hidden = true;
  say("Classifying …");
  const start = performance.now();
  try {
    const response = await fetch("v1/classify?top=5", {
      method: "POST", body: image, headers: { "content-type": "application/octet-stream" },
    });
    const answer = await response.json();
    if (number !== asked) return;
    if (!response.ok) throw new Error(answer.error);
    show(answer.predictions);
    const { decode, inference } = answer.milliseconds;
    const total = performance.now() - start;
    say(`Decoding ${decode.toFixed(1)} ms, inference ${inference.toFixed(1)} ms, ${total.toFixed(0)} ms in all.`);
  } catch (error) {
    if (number !== asked) return;
    show([]);
    say(error.message, true);
  }
}

function show(predictions) {
  at("classes").replaceChildren(...predictions.map(({ label, probability }) => {
    const percent = `${(100 * probability).toFixed(1)} %`;
    const name = element("div", "name", element("span", "", label), element("span", "", percent));
    const bar = element("div", "bar");
    requestAnimationFrame(() => { bar.style.width = `${100 * probability}%`; });
    return element("li", "", name, element("div", "track", bar));
  }));
}

function showHint() {
  preview.hidden = true;
  at("hint").hidden = false;
}

function element(tag, kind, ...children) {
  const made = document.createElement(tag);
  if (kind) made.className = kind;
  made.append(...children); // text stays text, whatever a label holds
  return made;
}

function say(text, wrong = false) {
  at("status").textContent = text;
  at("status").classList.toggle("wrong", wrong);
}

async function startCamera() {
  if (video.srcObject) {
    stopCamera();
    showHint();
    return;
  }
  if (!navigator.mediaDevices) {
    say("A browser gives its camera to pages of this machine or by https only.", true);
    return;
  }
  try {
    video.srcObject = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
    await video.play();
    video.hidden = at("capture").hidden = false;
    preview.hidden = at("hint").hidden = true;
    at("camera").textContent = "Stop the camera";
  } catch (error) {
    say(`The camera cannot be used: ${error.message}`, true);
  }
}

function stopCamera() {
  video.srcObject?.getTracks().forEach((track) => track.stop());
  video.srcObject = null;
  video.hidden = at("capture").hidden = true;
  at("camera").textContent = "Use the camera";
}

function takePicture() {
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [video.videoWidth, video.videoHeight];
  canvas.getContext("2d").drawImage(video, 0, 0);
  canvas.toBlob(classify, "image/jpeg", 0.95);
}

const firstImage = (files) => [...files].find((one) => one.type.startsWith("image/"));

preview.addEventListener("error", showHint); // an image that the browser cannot show; the server may
file.addEventListener("change", () => { if (file.files[0]) classify(file.files[0]); file.value = ""; });
drop.addEventListener("keydown", (event) => { if (["Enter", " "].includes(event.key)) { event.preventDefault(); file.click(); } });
for (const kind of ["dragover", "dragleave", "drop"]) {
  drop.addEventListener(kind, (event) => {
    event.preventDefault();
    drop.classList.toggle("over", kind === "dragover");
    const image = kind === "drop" && firstImage(event.dataTransfer.files);
    if (image) classify(image);
  });
}
addEventListener("paste", (event) => {
  const image = firstImage(event.clipboardData.files);
  if (image) classify(image);
});
at("camera").addEventListener("click", startCamera);
at("capture").addEventListener("click", takePicture);

const card = await (await fetch("card.json")).json();
document.title = at("model").textContent = card.name;
const { height, width } = card.preprocess;
const accuracy = card.metrics.accuracy === undefined ? "" : `, accuracy ${card.metrics.accuracy.toFixed(2)} % (${card.metrics.split ?? "test"})`;
at("facts").textContent = `${card.labels.length} classes, ${height} x ${width} pixels, ${card.precision}${accuracy}`;
at("labels").querySelector("p").textContent = card.labels.join(", ");
at("card").querySelector("pre").textContent = JSON.stringify(card, null, 2);
at("address").textContent = location.origin;
