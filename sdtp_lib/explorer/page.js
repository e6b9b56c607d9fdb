// The live page's behaviour. Data in, elements out; token text is only ever written as text, never as HTML.
// T tokens, S stages. A token's stage is the index of the cut that drops it, S for a token that stays to the end.
'use strict';
(() => {
const data = JSON.parse(document.getElementById('data').textContent);
const by = id => document.getElementById(id);
const S = data.layers.length, KEPT = S, NOBODY = '';
const choice = {prompt: 0, scorer: '', ratio: 0, view: 0, against: NOBODY, token: -1};  // ratio: index into data.ratios

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}
function unpack(text, Kind) {
  const bytes = Uint8Array.from(atob(text), c => c.charCodeAt(0));
  return new Kind(bytes.buffer);
}
for (const prompt of data.prompts) {
  const Kind = prompt.tokens.length < 65536 ? Uint16Array : Uint32Array;
  for (const scorer of Object.values(prompt.scorers)) {
    scorer.ranks = scorer.ranks.map(text => unpack(text, Kind));
    for (const run of Object.values(scorer.exact)) run.stages = unpack(run.stages, Uint8Array);
  }
}

// The cut of `token_fates.simulate`: of n kept tokens stay the first, the last, the protected, and the best of the rest.
function cut(ranks, ratios, prompt) {
  const tokens = prompt.tokens.length, never = new Set(prompt.protect);
  const stages = new Uint8Array(tokens).fill(KEPT);
  let left = Array.from({length: tokens}, (_, position) => position);
  ranks.forEach((rank, stage) => {
    const n = left.length, last = Math.max(data.min_local_tokens, Math.ceil(data.local_ratio * n));
    const free = left.slice(data.sink_tokens, Math.max(data.sink_tokens, n - last)).filter(p => !never.has(p));
    const keep = Math.min(n, Math.max(Math.floor(ratios[stage] * n + 1e-9), n - free.length));
    free.sort((a, b) => rank[a] - rank[b]);
    for (const position of free.slice(free.length - (n - keep))) if (keep < n) stages[position] = stage;
    left = left.filter(position => stages[position] === KEPT);
  });
  return stages;
}
// A position of the slider is one ratio for all cuts, or (a saved view's own) one for each.
const perCut = index => Array.isArray(data.ratios[index]) ? data.ratios[index] : new Array(S).fill(data.ratios[index]);
const mean = index => perCut(index).reduce((a, b) => a + b, 0) / S;
const dropsNothing = index => perCut(index).every(ratio => ratio === 1);
const percent = share => `${Math.round(1000 * share) / 10} %`;
function saidRatio(index) {
  const [least, most] = [Math.min(...perCut(index)), Math.max(...perCut(index))].map(percent);
  return least === most ? least : `${least} to ${most}`;
}
function fates(name) {
  const prompt = data.prompts[choice.prompt], scorer = prompt.scorers[name], exact = scorer.exact[choice.ratio];
  if (dropsNothing(choice.ratio)) return {exact: true, stages: new Uint8Array(prompt.tokens.length).fill(KEPT),
    answer: prompt.full_answer};
  return exact ? {exact: true, ...exact}
    : {exact: false, stages: cut(scorer.ranks, perCut(choice.ratio), prompt)};
}
function nearestRun(scorer) {
  const runs = Object.keys(scorer.exact).map(Number), far = run => Math.abs(mean(run) - mean(choice.ratio));
  return runs.length ? runs.reduce((a, b) => far(b) < far(a) ? b : a) : null;
}

// --- text and map ---------------------------------------------------------------------------------------------------
let spans = [], classes = [], shown = null, other = null;
const rules = data.colours.map(({rgb, ink}, s) => `.s${s}{background:rgb(${rgb});color:${ink}}#cells .s${s}{fill:rgb(${rgb})}`);
document.head.append(make('style', {}, rules.join('')));

function writeText() {
  const prompt = data.prompts[choice.prompt], box = by('text');
  spans = prompt.tokens.map((token, position) => {
    const span = make('span', {class: 't'}, token.replaceAll('\r', '␍').replaceAll('\n', '↵\n'));
    span.dataset.p = position;
    return span;
  });
  classes = spans.map(() => '');
  box.replaceChildren(...spans);
  for (const [first, last] of Object.values(prompt.places)) {  // one frame around each place
    const frame = make('span', {class: 'place'});
    spans[first].before(frame);
    frame.append(...spans.slice(first, last + 1));
  }
  by('jumps').replaceChildren(...Object.keys(prompt.places).map(name => {
    const button = make('button', {type: 'button'}, `go to the ${name}`);
    button.onclick = () => goTo(prompt.places[name][0]);
    return button;
  }));
  choice.token = -1;
  const first = prompt.places.answer ?? prompt.places.question;
  if (first) centre(spans[first[0]]); else box.scrollTop = 0;
}
function centre(span) {
  const box = by('text');
  box.scrollTop = span.offsetTop - box.clientHeight / 2;
}
function goTo(position) { centre(spans[position]); point(position); }

function classOf(position) {
  const stage = shown.stages[position];
  if (other) {  // who still keeps it in the layer looked at, or at the end
    const at = choice.view ? choice.view - 1 : S - 1, a = stage > at, b = other.stages[position] > at;
    return a && b ? 'k' : a ? 'a' : b ? 'b' : 'gone';
  }
  if (!choice.view) return stage === KEPT ? 'k' : `s${stage}`;
  return stage < choice.view - 1 ? 'gone' : stage === choice.view - 1 ? `s${stage}` : 'k';
}
function paintText() {
  spans.forEach((span, position) => {
    const wanted = classOf(position);
    if (classes[position] !== wanted) span.className = `t ${classes[position] = wanted}${position === choice.token ? ' at' : ''}`;
  });
}
const SVG = 'http://www.w3.org/2000/svg';
function paintMap() {
  const stages = shown.stages, T = stages.length, ends = [...data.layers, data.num_layers];
  const paths = Array.from({length: S + 1}, () => []);
  for (let start = 0, p = 1; p <= T; p++) if (p === T || stages[p] !== stages[start]) {
    paths[stages[start]].push(`M${start} 0h${p - start}v${ends[stages[start]]}h${start - p}z`);
    start = p;
  }
  const cells = by('cells');
  cells.setAttribute('viewBox', `0 0 ${T} ${data.num_layers}`);
  cells.replaceChildren(...paths.map((d, s) => {
    const path = document.createElementNS(SVG, 'path');
    path.setAttribute('class', s === KEPT ? 'k' : `s${s}`);
    path.setAttribute('d', d.join(''));
    return path;
  }));
}
function writeAxes() {
  const {tokens: {length: T}, places} = data.prompts[choice.prompt];
  // a round step with few enough numbers for a phone; the last one has room for its word
  const step = [1, 2, 5].flatMap(n => [1, 10, 100, 1e3, 1e4, 1e5].map(power => n * power)).sort((a, b) => a - b)
    .find(size => size >= T / 6) ?? T;
  const ticks = [];
  for (let p = 0; p < T - .18 * T; p += step) ticks.push(p);
  by('positions').replaceChildren(...[...ticks, T - 1].map(p => make('span', {style: `left:${100 * p / T}%`},
    p === T - 1 ? `token ${p}` : `${p}`)));
  by('places').replaceChildren(...Object.entries(places).map(([name, [first, last]]) => {
    const middle = (first + last + 1) / 2 / T;  // a name near an edge ends there
    const at = middle > .8 ? {style: `right:${100 * (1 - middle)}%`} : middle < .1 ? {style: `left:${100 * middle}%`}
      : {style: `left:${100 * middle}%`, class: 'mid'};
    return make('span', at, middle < .1 ? `▾ ${name}` : `${name} ▾`);
  }));
  const gap = 13 * data.num_layers / 170, layers = [];  // labels at least a line apart
  for (const layer of [0, ...data.layers]) if (!layers.length || layer - layers.at(-1) >= gap) layers.push(layer);
  by('layers').replaceChildren(...layers.map(layer => make('span',
    {style: `top:${Math.max(3, 100 * layer / data.num_layers)}%`}, `layer ${layer}`)));
}

// --- words ----------------------------------------------------------------------------------------------------------
const whole = share => `${Math.round(100 * share)} %`;
function fact(value, words) { return make('span', {}, make('b', {}, value), ` ${words}`); }

function writeNumbers() {
  const prompt = data.prompts[choice.prompt], T = prompt.tokens.length;
  const kept = shown.stages.reduce((n, stage) => n + (stage === KEPT), 0);
  const [flops, kv] = prompt.shares[choice.ratio];
  by('numbers').replaceChildren(
    fact(`${kept} of ${T}`, 'tokens reach the last layer'),
    ...(flops === null ? [] : [fact(whole(flops), 'of the prefill’s FLOPs')]),
    fact(whole(kv), 'of the KV cache'));
}
function writeExactness() {
  const scorer = data.prompts[choice.prompt].scorers[choice.scorer], box = by('exactness');
  if (shown.exact) return box.replaceChildren(make('b', {}, 'Exact'), dropsNothing(choice.ratio)
    ? ': nothing is dropped.' : ': the engine ran at this ratio.');
  box.replaceChildren(make('b', {}, 'Approximate'), ': cut from the scores of one unpruned run. ',
    ...(nearestRun(scorer) === null ? [] : ['The marks under the slider are exact.']));
}
function words(text) { return text.match(/\s+|\p{L}+|\p{N}+|[^\s\p{L}\p{N}]/gu) ?? []; }
// Longest common subsequence of two word lists: answers are a few dozen words.
function differ(a, b) {
  const best = Array.from({length: a.length + 1}, () => new Uint16Array(b.length + 1));
  for (let i = a.length - 1; i >= 0; i--) for (let j = b.length - 1; j >= 0; j--)
    best[i][j] = a[i] === b[j] ? best[i + 1][j + 1] + 1 : Math.max(best[i + 1][j], best[i][j + 1]);
  const left = [], right = [];
  for (let i = 0, j = 0; i < a.length || j < b.length;) {
    if (i < a.length && j < b.length && a[i] === b[j]) { left.push(a[i++]); right.push(b[j++]); }
    else if (j >= b.length || (i < a.length && best[i + 1][j] >= best[i][j + 1])) left.push(make('span', {class: 'lost'}, a[i++]));
    else right.push(make('span', {class: 'new'}, b[j++]));
  }
  return [left, right];
}
function writeAnswers() {
  const prompt = data.prompts[choice.prompt], scorer = prompt.scorers[choice.scorer];
  by('asked').replaceChildren(...(prompt.question ? [make('b', {}, 'Asked: '), prompt.question] : []),
    ...(prompt.right ? [make('b', {}, ' Right answer: '), prompt.right] : []));
  if (prompt.full_answer === null) return by('answers').replaceChildren();
  const near = shown.exact ? choice.ratio : nearestRun(scorer);
  const answer = shown.exact ? shown.answer : near === null ? null : scorer.exact[near].answer;
  const [left, right] = differ(words(prompt.full_answer.trim()), words((answer ?? prompt.full_answer).trim()));
  const boxes = [make('div', {}, make('h2', {}, 'Answer, nothing dropped'), ...left)];
  if (answer !== null) boxes.push(make('div', shown.exact ? {} : {class: 'old'}, make('h2', {}, shown.exact
    ? `Answer, pruned at ${saidRatio(near)}` : `Answer at ${saidRatio(near)}, the nearest ratio that was run`),
    ...(right.length ? right : [make('em', {}, '(empty)')])));
  by('answers').replaceChildren(...boxes);
}
function writeLegend() {
  const T = shown.stages.length, box = by('legend'), count = new Array(S + 1).fill(0);
  const swatch = look => make('i', {class: look});
  if (other) {
    const groups = {a: 0, b: 0, k: 0, gone: 0};
    for (let p = 0; p < T; p++) groups[classOf(p)]++;
    const either = groups.a + groups.b + groups.k;
    return box.replaceChildren(
      make('span', {}, swatch('a'), `only ${choice.scorer} keeps it: ${groups.a}`),
      make('span', {}, swatch('b'), `only ${choice.against} keeps it: ${groups.b}`),
      make('span', {}, swatch('k'), `both keep it: ${groups.k}`),
      make('span', {}, make('span', {class: 'gone'}, 'both dropped it'), `: ${groups.gone}`),
      make('span', {}, `they agree on ${whole(groups.k / Math.max(either, 1))} of what either keeps`));
  }
  shown.stages.forEach(stage => count[stage]++);
  box.replaceChildren(make('span', {}, 'Dropped before layer'), ...data.layers.map((layer, s) => {
    const chip = make('button', {type: 'button', 'aria-pressed': choice.view === s + 1,
      title: `${count[s]} tokens dropped before layer ${layer}; press to see what layer ${layer} still reads`},
      swatch(`s${s}`), `${layer}: ${count[s]}`);
    chip.onclick = () => { choice.view = choice.view === s + 1 ? 0 : s + 1; by('view').value = choice.view; redraw(); };
    return chip;
  }), make('span', {}, swatch('k'), choice.view ? 'still read' : `kept: ${count[KEPT]}`),
    ...(choice.view > 1 ? [make('span', {}, make('span', {class: 'gone'}, 'dropped earlier'))] : []));
}
function point(position) {
  const before = spans[choice.token];
  if (before) before.classList.remove('at');
  choice.token = position;
  const span = spans[position], cursor = by('cursor'), prompt = data.prompts[choice.prompt];
  cursor.style.display = span ? 'block' : 'none';
  if (!span) return by('info').replaceChildren('Point at a token, or press the arrow keys in the text.');
  span.classList.add('at');
  const T = spans.length, stage = shown.stages[position], cells = by('cells');
  const inner = cells.getBoundingClientRect(), outer = by('map').getBoundingClientRect();
  cursor.style.left = `${inner.left - outer.left + inner.width * (position + .5) / T - 1}px`;
  const told = stages => stages[position] === KEPT ? 'kept to the end' : `dropped before layer ${data.layers[stages[position]]}`;
  const ranks = prompt.scorers[choice.scorer].ranks, last = Math.min(stage, S - 1);
  by('info').replaceChildren(make('code', {}, prompt.tokens[position].replaceAll('\n', '↵')),
    ` token ${position} of ${T} · ${told(shown.stages)}`, ...(other ? [` (${choice.against}: ${told(other.stages)})`] : []),
    ` · place by score before layer ${data.layers[last]}: ${ranks[last][position] + 1} of ${T}`);
}

// --- choices --------------------------------------------------------------------------------------------------------
function redraw() {
  shown = fates(choice.scorer);
  other = choice.against === NOBODY ? null : fates(choice.against);
  by('ratio-said').value = saidRatio(choice.ratio);
  const layer = data.layers[choice.view - 1];
  by('view-said').value = choice.view ? `what layer ${layer} reads` : 'every cut';
  by('view').setAttribute('aria-valuetext', by('view-said').value);
  by('ratio').setAttribute('aria-valuetext', `${by('ratio-said').value}, ${shown.exact ? 'exact' : 'approximate'}`);
  paintText();
  paintMap();
  writeNumbers();
  writeExactness();
  writeAnswers();
  writeLegend();
  point(choice.token);
}
function fill(select, names, labels = names) {
  select.replaceChildren(...names.map((name, i) => make('option', {value: name}, labels[i])));
}
function newPrompt() {
  const scorers = Object.keys(data.prompts[choice.prompt].scorers);
  if (!scorers.includes(choice.scorer)) choice.scorer = scorers[0];
  fill(by('scorer'), scorers);
  fill(by('against'), [NOBODY, ...scorers], ['nothing', ...scorers]);
  by('scorer').value = choice.scorer;
  if (!scorers.includes(choice.against)) choice.against = NOBODY;
  by('against').value = choice.against;
  newMarks();
  writeText();
  writeAxes();
  redraw();
}
function newMarks() {
  const runs = data.prompts[choice.prompt].scorers[choice.scorer].exact;
  by('marks').replaceChildren(...Object.keys(runs).map(ratio => {
    const mark = make('button', {type: 'button', tabindex: -1, title: `exact at ${saidRatio(ratio)}`,
      style: `left:${100 * ratio / (data.ratios.length - 1)}%`});
    mark.onclick = () => { by('ratio').value = choice.ratio = +ratio; redraw(); };
    return mark;
  }));
}
const HELP = {
  prompt: 'What the model was given. Where they are known, the places of the answer and of the question are framed.',
  scorer: 'What decides which tokens stay: small trained networks (learned), the attention paid by the last tokens '
    + '(attention), the place in the prompt (recency), the size of the hidden state (hidden_norm), or chance (random).',
  ratio: 'The share of the tokens still read that stays at each cut. There are several cuts, so 80 % at each leaves far '
    + 'less at the end. The first tokens and the last tenth always stay. At the marks under the slider the engine really '
    + 'ran (exact); between them the sets are cut from the scores of one unpruned run (approximate: in a real run later '
    + 'scores depend on earlier cuts).',
  view: 'Every cut at once, or what one layer still reads: what is dropped just before it in colour, what was dropped '
    + 'earlier struck through. The buttons of the legend do the same.',
  against: 'A second scorer with the same share: which tokens does only one of the two keep?',
};
function explain(name, meaning) {
  const id = `help-${name}`, label = document.querySelector(`label[for=${name}]`);
  const button = make('button', {type: 'button', class: 'ask', popovertarget: id, title: meaning,
    'aria-label': `what “${label.textContent}” means`}, '?');
  label.after(button);
  document.body.append(make('div', {id, popover: ''}, meaning));
}

by('title').textContent = data.title;
by('lead').textContent = `${data.model}, ${data.num_layers} layers, ${S} cuts; nothing is loaded and nothing is sent.`;
for (const [name, meaning] of Object.entries(HELP)) explain(name, meaning);
for (const [name, value] of Object.entries(data.made)) by('made').append(make('tr', {}, make('td', {}, name), make('td', {}, value)));
fill(by('prompt'), data.prompts.map((_, i) => i), data.prompts.map(prompt => prompt.name));
by('ratio').min = 0;
by('ratio').max = data.ratios.length - 1;
by('view').max = S;
Object.assign(choice, data.start);
by('ratio').value = choice.ratio;
by('view').value = 0;
by('prompt').onchange = event => { choice.prompt = +event.target.value; newPrompt(); };
by('scorer').onchange = event => { choice.scorer = event.target.value; newMarks(); redraw(); };
by('against').onchange = event => { choice.against = event.target.value; redraw(); };
by('ratio').oninput = event => { choice.ratio = +event.target.value; redraw(); };
by('view').oninput = event => { choice.view = +event.target.value; redraw(); };
by('text').addEventListener('pointerover', event => { if (event.target.dataset?.p) point(+event.target.dataset.p); });
by('text').addEventListener('keydown', event => {
  const step = {ArrowRight: 1, ArrowLeft: -1}[event.key];
  if (!step) return;
  event.preventDefault();
  const position = Math.min(spans.length - 1, Math.max(0, choice.token < 0 ? 0 : choice.token + step));
  const span = spans[position], box = by('text');
  if (span.offsetTop < box.scrollTop || span.offsetTop + 30 > box.scrollTop + box.clientHeight) centre(span);
  point(position);
});
by('cells').addEventListener('pointermove', event => {
  const edge = by('cells').getBoundingClientRect(), at = (event.clientX - edge.left) / edge.width;
  point(Math.min(spans.length - 1, Math.max(0, Math.floor(at * spans.length))));
});
by('cells').addEventListener('click', () => { if (choice.token >= 0) centre(spans[choice.token]); });
addEventListener('resize', () => point(choice.token));
newPrompt();
})();
