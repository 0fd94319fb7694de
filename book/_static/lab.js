// The lab of "In your browser": runs the book's networks with ONNX Runtime Web, on the reader's machine.
// Nothing that is computed or photographed leaves the page. Loaded only where the page is served over HTTP.

const HERE = new URL(".", import.meta.url);
const WARMUP = 3, ROUNDS = 24; // so that each of three or four networks is first as often as the others
const COLOURS = { original: "#999999", dense: "#56B4E9" }; // as in the figures; all that is merged is green,
const MERGED = "#009E73", DROPPED = "#D55E00"; // and where the planner dropped blocks, as the planner's points
const FILES = { // of ONNX Runtime Web: its module, and the binary that this loads
  wasm: ["ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm"],
  webgpu: ["ort.webgpu.bundle.min.mjs", "ort-wasm-simd-threaded.asyncify.wasm"],
};

const lab = document.getElementById("lab");
const recorded = JSON.parse(document.getElementById("lab-recorded").textContent);
const sessions = {}; // "runtime name" -> promise of a session
let about; // networks.json

/** An element with attributes and children. */
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/** A file beside this one; an error that says what is missing. */
async function fetched(path) {
  const answer = await fetch(new URL(path, HERE));
  if (!answer.ok) throw new Error(`${path} is missing: python3 dev.py book makes it, or says why it cannot`);
  return answer;
}

/** ONNX Runtime Web for a runtime; one thread, as pages without special headers have no shared memory. */
async function ortFor(runtime) {
  const [module, binary] = FILES[runtime].map((name) => new URL(`vendor/ort/${name}`, HERE).href);
  const ort = await import(module).catch((error) => {
    throw new Error(`ONNX Runtime Web is not here (was npm reached when this book was built?): ${error.message}`);
  });
  ort.env.wasm.wasmPaths = { wasm: binary };
  ort.env.wasm.numThreads = 1;
  ort.env.logLevel = "error";
  return ort;
}

/** A network, ready to run. */
async function loaded(runtime, name) {
  const ort = await ortFor(runtime);
  const bytes = await (await fetched(`lab/${name}.onnx`)).arrayBuffer();
  return ort.InferenceSession.create(new Uint8Array(bytes), { executionProviders: [runtime] });
}

/** A function that runs a network on one image, 3 * side * side numbers channel by channel, and gives its logits. */
async function runner(runtime, name, image) {
  const key = `${runtime} ${name}`;
  sessions[key] ??= loaded(runtime, name).catch((error) => {
    delete sessions[key]; // the next click tries again
    throw error;
  });
  const [ort, session] = await Promise.all([ortFor(runtime), sessions[key]]);
  const images = new ort.Tensor("float32", image, [1, 3, about.image_size, about.image_size]);
  return async () => (await session.run({ images })).logits.data;
}

/** Let the page draw what has changed. */
function drawnNow() {
  return new Promise((resolve) => setTimeout(resolve, 20));
}

/** The image that PyTorch's stored logits are of: see lab.py. */
function testImage() {
  return Float32Array.from({ length: 3 * about.image_size ** 2 }, (_, i) => Math.sin(0.01 * i));
}

/** The value below which a share of the numbers lies. */
function quantile(numbers, share) {
  const sorted = [...numbers].sort((a, b) => a - b), at = share * (sorted.length - 1), low = Math.floor(at);
  return sorted[low] + (at - low) * (sorted[Math.min(low + 1, sorted.length - 1)] - sorted[low]);
}

/** Largest difference between two lists of logits, over the largest logit. */
function difference(found, expected) {
  const largest = Math.max(...expected.map(Math.abs));
  return Math.max(...expected.map((value, i) => Math.abs(value - found[i]))) / largest;
}

/** All networks in turns: name -> milliseconds a round; and how far each is from PyTorch. */
async function measured(runtime, say) {
  const image = testImage(), names = Object.keys(about.networks), run = {}, ms = {}, off = {};
  for (const name of names) {
    say(`loading ${about.networks[name].title} ...`);
    run[name] = await runner(runtime, name, image);
    off[name] = difference(await run[name](), about.networks[name].logits);
    for (let i = 1; i < WARMUP; i++) await run[name]();
    ms[name] = [];
  }
  say("measuring ...");
  for (let round = 0; round < ROUNDS; round++) {
    await drawnNow(); // nothing is drawn while a network runs
    for (let i = 0; i < names.length; i++) {
      const name = names[(round + i) % names.length];
      const began = performance.now();
      await run[name]();
      ms[name].push(performance.now() - began);
    }
  }
  return { ms, off };
}

/** Bars of speed-ups over the original, a group for each place: [{place, bars: [{name, ms, speedup, low, high}]}]. */
function drawn(groups) {
  const most = Math.max(...groups.flatMap((group) => group.bars.map((bar) => bar.speedup)));
  const parts = groups.map(({ place, bars }) => make("tbody", {},
    make("tr", {}, make("th", { colspan: 4, scope: "rowgroup" }, place)),
    ...bars.map(({ name, ms, speedup, low, high }) => {
      const bar = make("div", { "aria-hidden": "true" }), other = about.networks[name].dropped ? DROPPED : MERGED;
      bar.style.cssText = `height: 0.9em; width: ${(100 * speedup) / most}%; background: ${COLOURS[name] ?? other}`;
      const cell = make("td", {}, bar);
      cell.style.width = "40%";
      const spread = ` (${low.toFixed(2)} to ${high.toFixed(2)})`;
      const title = about.networks[name].title;
      return make("tr", {}, make("th", { scope: "row" }, title), cell, make("td", {}, speedup.toFixed(2) + spread),
                  make("td", {}, ms.toFixed(2)));
    })));
  const titles = ["network", "bar", "times as fast (quartiles)", "ms"].map((text) => make("th", { scope: "col" }, text));
  return make("table", { class: "table" }, make("thead", {}, make("tr", {}, ...titles)), ...parts);
}

/** The group of bars of what was just measured. */
function here(runtime, ms) {
  const bars = Object.entries(ms).map(([name, times]) => {
    const ratios = times.map((time, i) => ms.original[i] / time);
    const mid = quantile(times, 0.5);
    return { name, ms: mid, speedup: quantile(ms.original, 0.5) / mid,
             low: quantile(ratios, 0.25), high: quantile(ratios, 0.75) };
  });
  return { place: `your browser, ${runtime === "wasm" ? "WASM SIMD, one thread" : "WebGPU"}, now`, bars };
}

/** A picture as the networks want it: its middle square, normalised; and drawn on a canvas. */
function prepared(picture, width, height) {
  const side = about.image_size, canvas = make("canvas", { width: side, height: side, role: "img",
                                                          "aria-label": "your picture, cropped" });
  const context = canvas.getContext("2d"), square = Math.min(width, height);
  context.imageSmoothingQuality = "high";
  context.drawImage(picture, (width - square) / 2, (height - square) / 2, square, square, 0, 0, side, side);
  const { data } = context.getImageData(0, 0, side, side);
  const image = Float32Array.from({ length: 3 * side * side }, (_, i) => {
    const channel = Math.floor(i / (side * side)), pixel = i % (side * side);
    return (data[4 * pixel + channel] / 255 - about.mean[channel]) / about.std[channel];
  });
  return { image, canvas };
}

/** What the networks with trained weights say of an image. */
async function classified(image) {
  const columns = [];
  for (const [name, { title, trained }] of Object.entries(about.networks)) {
    if (!trained) continue;
    const run = await runner("wasm", name, image);
    const logits = Array.from(await run()), top = Math.max(...logits);
    const weights = logits.map((logit) => Math.exp(logit - top)), sum = weights.reduce((a, b) => a + b);
    const best = weights.map((weight, i) => [weight / sum, about.classes[i]]).sort((a, b) => b[0] - a[0]).slice(0, 3);
    const lines = best.map(([share, label]) => make("li", {}, `${label}: ${(100 * share).toFixed(0)} %`));
    columns.push(make("div", {}, make("strong", {}, title), make("ol", {}, ...lines)));
  }
  return columns;
}

/** Show a picture and what it is taken for. */
async function show(place, { image, canvas }) {
  place.replaceChildren(canvas, "loading ...");
  place.replaceChildren(canvas, ...(await classified(image)));
}

/** Do something once at a time in the whole lab, and say what goes wrong: what is measured must not be disturbed. */
async function alone(status, act) {
  const controls = lab.querySelectorAll("button, input, select");
  controls.forEach((control) => { control.disabled = true; });
  status.textContent = "";
  try {
    await act();
  } catch (error) {
    status.textContent = `This did not work: ${error.message}`;
  }
  controls.forEach((control) => { control.disabled = false; });
}

/** A button. */
function button(text, status, act) {
  const element = make("button", { type: "button", class: "btn btn-primary" }, text);
  element.addEventListener("click", () => alone(status, act));
  return element;
}

/** The part that measures. */
function timing() {
  const status = make("p", { role: "status" }), bars = make("div");
  const options = ["wasm", ...(navigator.gpu ? ["webgpu"] : [])].map((name) =>
    make("option", { value: name }, name === "wasm" ? "WASM SIMD, one thread" : "WebGPU"));
  const runtime = make("select", { id: "lab-runtime" }, ...options);
  const say = (text) => { status.textContent = text; };
  const go = button("Measure here", status, async () => {
    const chosen = runtime.value;
    const { ms, off } = await measured(chosen, say);
    bars.replaceChildren(drawn([here(chosen, ms), ...recorded]));
    const furthest = Math.max(...Object.values(off));
    lab.dataset.difference = furthest;
    say(`The networks' outputs differ from PyTorch's by ${furthest.toExponential(1)} of the largest.`);
  });
  bars.append(drawn(recorded));
  return make("div", {}, make("label", { for: "lab-runtime" }, "Run with "), runtime, " ", go, status, bars);
}

/** The part that classifies. */
function pictures() {
  const status = make("p", { role: "status" }), answer = make("div", { id: "lab-answer", role: "status" });
  answer.style.cssText = "display: flex; flex-wrap: wrap; gap: 1em; margin-top: 1em";
  const file = make("input", { type: "file", accept: "image/*", id: "lab-file" });
  file.addEventListener("change", () => file.files.length && alone(status, async () => {
    const picture = await createImageBitmap(file.files[0]).catch(() => {
      throw new Error("the file is no picture that this browser reads");
    });
    await show(answer, prepared(picture, picture.width, picture.height));
  }));
  const camera = button("Use the camera", status, async () => {
    if (!navigator.mediaDevices) throw new Error("browsers give the camera to https and localhost only");
    const stream = await navigator.mediaDevices.getUserMedia({ video: true });
    const video = make("video", { playsinline: "", muted: "" });
    let picture;
    try {
      video.srcObject = stream;
      await video.play();
      picture = prepared(video, video.videoWidth, video.videoHeight);
    } finally {
      stream.getTracks().forEach((track) => track.stop());
    }
    await show(answer, picture);
  });
  return make("div", {}, make("label", { for: "lab-file" }, "A picture: "), file, " ", camera, status, answer);
}

try {
  about = await (await fetched("lab/networks.json")).json();
  const heading = (text) => make("p", {}, make("strong", {}, text));
  lab.replaceChildren(heading("How fast?"), timing(), heading(`What is it? One of: ${about.classes.join(", ")}.`),
                      pictures());
} catch (error) {
  lab.textContent = `The lab cannot run: ${error.message}.`;
}
