'use strict';
// One tab: sends what the person does, draws what the server sends. Texts are set as text, never as HTML.

const $ = id => document.getElementById(id);
const KEEP = 240;  // steps of the chart
const PATH = 120;  // and of the path
const REACH = 0.4;  // of the picture's side: a drag of that length acts as far as one can
const KEYS = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1]};
const SLIDERS = ['alpha', 'beta', 'psi', 'rate'];

let told = null;  // the hello
let settings = {};
let pulled = [0, 0];  // the drag that acts now
let grip = null;  // where a pointer went down, in pixels of the stage
const held = new Set();  // arrow keys
const rewards = [], path = [], times = [];
let dirty = false, failed = false;

const address = new URL('play', location.href.replace(/^http/, 'ws'));
const socket = new WebSocket(address);
socket.binaryType = 'arraybuffer';

function send(message) {
  if (socket.readyState === WebSocket.OPEN) socket.send(JSON.stringify(message));
}

function say(text, bad = false) {
  $('status').textContent = text;
  $('status').classList.toggle('bad', bad);
}

function set(values) {
  Object.assign(settings, values);
  send({do: 'set', ...values});
  show();
}

function later() {
  if (dirty) return;
  dirty = true;
  requestAnimationFrame(() => { dirty = false; drawChart(); drawMap(); tell(); });
}

// ---- what the server sends

socket.onopen = () => say('Connected');
socket.onclose = event => {
  if (event.code === 1013) say('Too many tabs: close one, then reload', true);
  else if (!failed) say('The connection has ended: reload; if that fails, start the server again and open its new address', true);
  for (const element of document.querySelectorAll('button, input, select')) element.disabled = true;
};
socket.onmessage = event => {
  if (typeof event.data === 'string') return receive(JSON.parse(event.data), null);
  const length = new DataView(event.data).getUint32(0, true);
  const header = new TextDecoder().decode(new Uint8Array(event.data, 4, length));
  receive(JSON.parse(header), new Uint8ClampedArray(event.data, 4 + length));
};

function receive(message, content) {
  if (message.kind === 'hello') begin(message);
  else if (message.kind === 'frame') frame(message, content);
  else if (message.kind === 'nearest') nearest(message.found);
  else if (message.kind === 'film') save(message, content);
  else if (message.kind === 'error') { failed = message.text.includes('has failed'); say(message.text, true); $('film').disabled = false; $('saved').textContent = ''; }
}

function frame(message, pixels) {
  const canvas = $('picture');
  canvas.getContext('2d').putImageData(new ImageData(pixels, canvas.width, canvas.height), 0, 0);
  const now = performance.now();
  times.push(now);
  while (times.length > 2 && now - times[0] > 2000) times.shift();
  told.now = message;
  if (message.step === 0) path.push(null);  // another episode: the line breaks
  if (message.x !== null && message.y !== null) path.push([message.x, message.y]);
  rewards.push(message.reward);
  while (path.length > PATH) path.shift();
  while (rewards.length > KEEP) rewards.shift();
  later();
}

function tell() {
  const now = told && told.now;
  if (!now) return;
  const span = times[times.length - 1] - times[0];
  $('fps').textContent = times.length > 2 ? ((times.length - 1) * 1000 / span).toFixed(1) : '–';
  $('episode').textContent = now.episode;
  $('count').textContent = now.step;
  $('class').textContent = told.classes.length ? told.classes[now.label] : 'none';
  $('reward').textContent = now.reward === null ? 'not a number' : now.reward.toFixed(3);
}

function nearest(found) {
  const list = $('nearest');
  while (list.children.length < found.length) {
    const item = document.createElement('li');
    item.append(document.createElement('img'), document.createElement('span'), document.createElement('span'));
    list.append(item);
  }
  found.forEach((each, i) => {
    const [image, name, cosine] = list.children[i].children;
    image.src = `real/${each.id}.png`;
    image.alt = `Real picture of class ${each.name}`;
    name.textContent = name.title = each.name;
    cosine.textContent = each.cosine.toFixed(2);
  });
}

function save(message, content) {
  const link = document.createElement('a');
  link.href = URL.createObjectURL(new Blob([content], {type: 'image/webp'}));
  link.download = 'latent_world.webp';
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
  $('film').disabled = false;
  $('saved').textContent = `saved: ${message.frames} frames at ${message.fps}/s`;
}

// ---- the page

function begin(message) {
  told = message;
  settings = {...message.set};
  const canvas = $('picture');
  canvas.width = message.width;
  canvas.height = message.height;
  $('about').textContent = `${message.about.generator}: latents of ${message.z_dim} numbers, ${message.width}x${message.height} pixels`;
  for (const element of document.querySelectorAll('.whose')) element.textContent = message.about.features;
  $('points').textContent = message.points.length;
  $('data').textContent = message.real ? `Cosine of features less their mean, among ${message.real} pictures of ${message.about.data}.` : message.about.data;
  for (const name of SLIDERS) [$(name).min, $(name).max] = message.bounds[name];
  const words = {person: 'me', random: 'random agent', trained: 'trained agent'};
  for (const who of ['person', 'random', 'trained']) {
    const button = choice($('players'), words[who], () => set({who}));
    button.dataset.who = who;
    button.disabled = !message.players.includes(who);
  }
  $('trained').textContent = message.about.trained;
  $('trained').hidden = message.players.includes('trained');
  makeClasses(message.classes);
  $('stage').focus({preventScroll: true});
  show();
}

function choice(parent, text, act) {
  const button = document.createElement('button');
  button.textContent = text;
  button.onclick = act;
  parent.append(button);
  return button;
}

function makeClasses(names) {
  $('classes-part').hidden = names.length < 2;
  if (names.length < 2) return;
  choice($('classes'), 'random', () => set({label: -1})).dataset.label = -1;
  if (names.length <= 20) {
    names.forEach((name, label) => { choice($('classes'), name, () => set({label})).dataset.label = label; });
    return;
  }
  const input = document.createElement('input');
  Object.assign(input, {type: 'number', min: 0, max: names.length - 1, step: 1, placeholder: `0 to ${names.length - 1}`});
  input.setAttribute('aria-label', 'Class number');
  input.onchange = () => { if (input.value !== '' && input.checkValidity()) set({label: Number(input.value)}); };
  $('classes').append(input);
}

function show() {
  for (const name of SLIDERS) {
    $(name).value = settings[name];
    document.querySelector(`output[for=${name}]`).textContent = name === 'rate' ? settings[name] : settings[name].toFixed(2);
  }
  $('length').value = settings.length === told.endless ? '0' : String(settings.length);
  $('waits').checked = settings.waits;
  $('pause').setAttribute('aria-pressed', settings.paused);
  $('pause').textContent = settings.paused ? 'Go on' : 'Pause';
  for (const button of $('players').children) button.setAttribute('aria-pressed', button.dataset.who === settings.who);
  for (const button of $('classes').querySelectorAll('button')) button.setAttribute('aria-pressed', Number(button.dataset.label) === settings.label);
}

for (const name of SLIDERS) $(name).oninput = () => set({[name]: Number($(name).value)});
$('length').onchange = () => set({length: Number($('length').value) || told.endless});
$('waits').onchange = () => set({waits: $('waits').checked});
$('pause').onclick = () => set({paused: !settings.paused});
$('step').onclick = () => { set({paused: true}); send({do: 'step'}); };
$('reset').onclick = () => send({do: 'reset'});
$('turn').onclick = () => { send({do: 'turn'}); $('how').textContent = 'Two other directions. Drag, or hold arrow keys, to see where they lead. Space pauses.'; };
$('film').onclick = () => {
  $('film').disabled = true;
  $('saved').textContent = 'making it …';
  send({do: 'film', seconds: Number($('seconds').value)});
};

// ---- acting

function pull(x, y) {
  const far = Math.max(1, Math.hypot(x, y));
  pulled = [x / far, y / far];
  if ((x || y) && settings.who !== 'person') set({who: 'person'});
  send({do: 'drag', x: pulled[0], y: pulled[1]});
  drawPull();
}

const stage = $('stage');
const place = event => { const box = stage.getBoundingClientRect(); return [event.clientX - box.left, event.clientY - box.top]; };
stage.onpointerdown = event => {
  if (event.button || !told) return;
  stage.setPointerCapture(event.pointerId);
  grip = place(event);
  drawPull();
};
let waiting = null;  // the last move that was not sent yet: at most one a frame
stage.onpointermove = event => {
  if (!grip) return;
  const first = waiting === null;
  waiting = place(event);
  if (first) requestAnimationFrame(() => {
    if (grip && waiting) {
      const reach = REACH * stage.clientWidth;
      pull((waiting[0] - grip[0]) / reach, (grip[1] - waiting[1]) / reach);
    }
    waiting = null;
  });
};
const letGo = () => { if (grip) { grip = null; pull(0, 0); } };
stage.onpointerup = stage.onpointercancel = stage.onlostpointercapture = letGo;

function steer() {
  let x = 0, y = 0;
  for (const key of held) { x += KEYS[key][0]; y += KEYS[key][1]; }
  pull(x, y);
}
const isField = target => target.closest('input, select, textarea') !== null;
document.onkeydown = event => {
  if (!told || event.ctrlKey || event.metaKey || event.altKey || isField(event.target)) return;
  if (event.key in KEYS) {
    event.preventDefault();
    if (!event.repeat) { held.add(event.key); steer(); }
  } else if (event.key === ' ' && !event.target.closest('button')) {
    event.preventDefault();
    if (!event.repeat) $('pause').click();
  }
};
document.onkeyup = event => { if (held.delete(event.key)) steer(); };
const release = () => { letGo(); if (held.size) { held.clear(); steer(); } };
window.onblur = release;
let before = null;  // whether it was paused when the tab was hidden
document.onvisibilitychange = () => {
  if (!told) return;
  if (document.hidden) { release(); before = settings.paused; set({paused: true}); }
  else if (before !== null) { set({paused: before}); before = null; }
};

// ---- drawings

function surface(canvas) {
  const ratio = window.devicePixelRatio || 1;
  const width = canvas.clientWidth, height = canvas.clientHeight;
  if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
  }
  const context = canvas.getContext('2d');
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, height);
  return [context, width, height];
}
const colour = name => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

function drawPull() {
  const [context, width, height] = surface($('overlay'));
  const [x, y] = pulled;
  if (!x && !y) return;
  const from = grip || [width / 2, height / 2], reach = REACH * width;
  const to = [from[0] + x * reach, from[1] - y * reach];
  for (const [style, wide] of [['rgba(0,0,0,.65)', 6], ['#fff', 3]]) {  // seen on any picture
    context.strokeStyle = context.fillStyle = style;
    context.lineWidth = wide;
    context.beginPath();
    context.moveTo(...from);
    context.lineTo(...to);
    context.stroke();
    context.beginPath();
    context.arc(...to, wide + 3, 0, 2 * Math.PI);
    context.fill();
  }
}

function drawChart() {
  const [context, width, height] = surface($('chart'));
  const known = rewards.filter(x => x !== null);
  const top = Math.max(...known, 1e-6), left = 38, low = height - 6, high = 8;
  context.font = '11px system-ui, sans-serif';
  context.textAlign = 'right';
  context.textBaseline = 'middle';
  for (const [value, y] of [[top, high], [0, low]]) {
    context.fillStyle = colour('soft');
    context.fillText(value ? value.toPrecision(2) : '0', left - 6, y);
    context.strokeStyle = colour('line');
    context.lineWidth = 1;
    context.beginPath();
    context.moveTo(left, y + .5);
    context.lineTo(width, y + .5);
    context.stroke();
  }
  context.strokeStyle = colour('accent');
  context.lineWidth = 1.6;
  context.beginPath();
  const step = (width - left) / (KEEP - 1), first = KEEP - rewards.length;
  let begun = false;
  rewards.forEach((value, i) => {
    if (value === null) { begun = false; return; }
    const x = left + (first + i) * step, y = low - (low - high) * value / top;
    if (begun) context.lineTo(x, y); else context.moveTo(x, y);
    begun = true;
  });
  context.stroke();
}

function drawMap() {
  const [context, width, height] = surface($('map'));
  const been = path.filter(point => point !== null);
  const all = [...told.points, ...been];
  const bounds = axis => [Math.min(...all.map(p => p[axis])), Math.max(...all.map(p => p[axis]))];
  const [[left, right], [bottom, top]] = [bounds(0), bounds(1)];
  const wide = (width - 20) / Math.max(right - left, 1e-6), high = (height - 20) / Math.max(top - bottom, 1e-6);
  const put = ([x, y]) => [10 + (x - left) * wide, height - 10 - (y - bottom) * high];
  context.fillStyle = colour('dot');
  for (const point of told.points) {
    context.beginPath();
    context.arc(...put(point), 2, 0, 2 * Math.PI);
    context.fill();
  }
  context.strokeStyle = context.fillStyle = colour('path');
  context.lineJoin = 'round';
  path.forEach((point, i) => {
    const former = path[i - 1];
    if (!point || !former) return;
    context.globalAlpha = .08 + .92 * (i / path.length) ** 2;  // what is long ago fades
    context.lineWidth = 2;
    context.beginPath();
    context.moveTo(...put(former));
    context.lineTo(...put(point));
    context.stroke();
  });
  context.globalAlpha = 1;
  if (!been.length) return;
  context.beginPath();
  context.arc(...put(been[been.length - 1]), 5, 0, 2 * Math.PI);
  context.fill();
}

const redraw = () => { if (told && told.now) later(); drawPull(); };
window.onresize = redraw;
matchMedia('(prefers-color-scheme: dark)').addEventListener('change', redraw);
