// Live: microphone -> PCM messages -> the service's WebSocket -> a band with the answers of the last 30 s.
const SHOWN_S = 30, PIECES_A_SECOND = 10, MOST_WAITING_BYTES = 1 << 20;
const WORKLET = `registerProcessor('ser-pcm', class extends AudioWorkletProcessor {
  constructor() { super(); this.size = Math.round(sampleRate / ${PIECES_A_SECOND}); this.renew(); }
  renew() { this.piece = new Int16Array(this.size); this.count = 0; }
  process(inputs) {
    for (const value of inputs[0][0] || []) {
      this.piece[this.count++] = Math.max(-1, Math.min(1, value)) * 32767;
      if (this.count === this.size) { this.port.postMessage(this.piece.buffer, [this.piece.buffer]); this.renew(); }
    }
    return true;
  }
});`;
const CLOSED = {
  4408: 'No sound arrived for too long; start again.',
  4413: 'Live runs for half an hour at most; start again.',
  4429: 'Too many people use Live at the moment; try again later.',
  4503: 'The service is stopping or starting; try again in a moment.',
  1006: 'This browser cannot reach the service. Reload the page; if that does not help, check the address (SER_API_URL) and the key (SER_API_KEY) of the page.',
};
const sessions = new WeakMap();

const onThisMachine = (name) =>
  name === 'localhost' || name.endsWith('.localhost') || name.startsWith('127.') || name === '[::1]';

/** The URL of the service's WebSocket for this browser; throws an Error where the browser cannot reach it. */
const streamAddress = (service) => {
  const url = new URL(service);
  if (onThisMachine(url.hostname)) {
    if (!onThisMachine(location.hostname)) {
      throw new Error("Live cannot work here: the service's address works only on the page's own machine. Set SER_API_URL to an address that your browser can reach.");
    }
    url.hostname = location.hostname; // so that the browser sees one site
  } else if (location.protocol === 'https:' && url.protocol === 'http:') {
    throw new Error('Live cannot work here: this page uses https, but the service does not. Set SER_API_URL to an https address.');
  }
  url.protocol = url.protocol === 'https:' ? 'wss:' : 'ws:';
  url.pathname = `${url.pathname.replace(/\/$/, '')}/v1/stream`;
  return url;
};

class Session {
  constructor(root) {
    const one = (name) => root.querySelector(name);
    this.root = root;
    this.parts = { answer: one('.ser-answer'), sure: one('.ser-sure'), track: one('.track'), legend: one('.legend') };
    this.parts = { ...this.parts, toggle: one('.toggle'), level: one('.level i'), told: one('.told') };
    this.running = null;
    this.parts.toggle.onclick = () => (this.running ? this.stop() : this.start());
  }

  async start() {
    const run = (this.running = { runs: [], soundS: 0 });
    this.parts.toggle.textContent = 'Stop';
    this.parts.track.replaceChildren();
    this.parts.legend.replaceChildren();
    this.move(run);
    this.tell('');
    this.say('Listening …', '');
    try {
      if (!navigator.mediaDevices) throw new Error('Browsers give a page the microphone only on localhost or over https.');
      const url = streamAddress(this.data.service);
      run.sound = await navigator.mediaDevices.getUserMedia({
        audio: { channelCount: 1, echoCancellation: false, noiseSuppression: false, autoGainControl: false },
      });
      run.context = new AudioContext();
      const code = URL.createObjectURL(new Blob([WORKLET], { type: 'text/javascript' }));
      await run.context.audioWorklet.addModule(code);
      URL.revokeObjectURL(code);
      await run.context.resume();
      if (this.running !== run) return this.release(run); // stopped meanwhile
      this.connect(run, url);
    } catch (error) {
      const refused = error.name === 'NotAllowedError' || error.name === 'NotFoundError';
      if (this.running === run) this.stop(refused ? 'No microphone: allow it for this page in the browser, or connect one.' : error.message);
      this.release(run);
    }
  }

  connect(run, url) {
    url.search = new URLSearchParams({
      format: 's16le', sample_rate_hz: run.context.sampleRate, min_confidence: this.data.doubtBelow, top_k: 2,
    });
    run.socket = new WebSocket(url, this.data.protocols);
    run.socket.binaryType = 'arraybuffer';
    run.socket.onmessage = ({ data }) => this.hear(run, JSON.parse(data));
    run.socket.onclose = ({ code }) => {
      if (this.running === run) this.stop(run.problem || CLOSED[code] || 'The service ended the stream; start again.');
      this.release(run);
    };
    run.worklet = new AudioWorkletNode(run.context, 'ser-pcm');
    run.worklet.port.onmessage = ({ data }) => this.send(run, data);
    run.context.createMediaStreamSource(run.sound).connect(run.worklet).connect(run.context.destination); // silent
  }

  send(run, piece) {
    const loudest = new Int16Array(piece).reduce((most, value) => Math.max(most, Math.abs(value)), 1);
    this.parts.level.style.width = `${Math.max(0, 100 + (20 * Math.log10(loudest / 32768) * 100) / 60)}%`;
    if (!run.ready || run.socket.readyState !== WebSocket.OPEN) return;
    if (run.socket.bufferedAmount > MOST_WAITING_BYTES) return this.tell('The connection is too slow; parts of the sound are skipped.');
    run.socket.send(piece);
    run.soundS += 1 / PIECES_A_SECOND;
    this.move(run);
  }

  hear(run, message) {
    if (message.type === 'ready') run.ready = true;
    if (message.type === 'error') run.problem = CLOSED[4000 + message.problem.status] || message.problem.detail;
    if (message.type !== 'answer' && message.type !== 'done') return;
    for (const segment of message.segments) this.draw(run, segment);
    if (message.type === 'done') return;
    run.runs = run.runs.filter((drawn) => drawn.end > run.soundS - SHOWN_S || void drawn.element.remove());
    const { label, scores, confidence } = message.window, known = this.known(label);
    const share = (score) => `${this.known(score.label).word} (${Math.round(100 * score.score)} %)`;
    const told = known.kind === 'unsure' ? `No clear answer. Closest: ${scores.map(share).join(', ')}` : known.told;
    const sure = this.data.sure.find(([least]) => confidence >= least);
    this.say(told, known.kind === 'emotion' && sure ? `${sure[1]}: ${Math.round(100 * confidence)} %` : '\u00a0');
  }

  known(label) {
    return this.data.labels[label] || { word: label, told: label, kind: 'emotion', colour: '#8a99a0', ink: '#000000' };
  }

  /** Draw a segment in the band; the last one is updated until it is final. */
  draw(run, segment) {
    const known = this.known(segment.label);
    let drawn = run.runs[run.runs.length - 1];
    if (!drawn || drawn.final) {
      drawn = { element: document.createElement('div') };
      run.runs.push(drawn);
      this.parts.track.append(drawn.element);
    }
    Object.assign(drawn, { start: segment.start_s, end: segment.end_s, final: segment.final });
    const { element } = drawn, share = (seconds) => `${(100 * seconds) / SHOWN_S}%`;
    element.className = `run ${known.kind}${segment.final ? '' : ' interim'}`;
    element.title = `${known.word}, ${segment.start_s.toFixed(1)} s to ${segment.end_s.toFixed(1)} s`;
    element.style.left = share(drawn.start);
    element.style.width = share(drawn.end - drawn.start);
    if (known.kind === 'emotion') Object.assign(element.style, { backgroundColor: known.colour, color: known.ink });
    const roomPx = ((drawn.end - drawn.start) * this.parts.track.clientWidth) / SHOWN_S;
    element.textContent = roomPx > 14 + 8 * known.word.length ? known.word : '';
    if (!this.parts.legend.querySelector(`[data-label="${segment.label}"]`)) this.explain(segment.label, known);
  }

  explain(label, known) {
    const entry = document.createElement('li'), mark = document.createElement('i');
    entry.dataset.label = label;
    mark.className = known.kind;
    if (known.kind === 'emotion') mark.style.backgroundColor = known.colour;
    entry.append(mark, known.word);
    this.parts.legend.append(entry);
  }

  move(run) { this.parts.track.style.transform = `translateX(${(100 * (SHOWN_S - run.soundS)) / SHOWN_S}%)`; }

  say(told, sure) {
    if (this.parts.answer.textContent !== told) this.parts.answer.textContent = told;
    if (this.parts.sure.textContent !== sure) this.parts.sure.textContent = sure;
  }

  tell(line) { this.parts.told.textContent = line; }

  stop(line = '') {
    const run = this.running;
    this.running = null;
    this.parts.toggle.textContent = 'Start';
    this.parts.level.style.width = '0';
    this.tell(line);
    if (!run) return;
    if (line) this.say('Live has ended', '\u00a0');
    if (!run.socket || run.socket.readyState !== WebSocket.OPEN) return this.release(run);
    run.socket.send(JSON.stringify({ type: 'end' }));
    this.hush(run);
  }

  /** Turn off microphone and audio; the last answers may still arrive. */
  hush(run) {
    for (const track of run.sound ? run.sound.getTracks() : []) track.stop();
    if (run.context && run.context.state !== 'closed') run.context.close();
  }

  release(run) {
    this.hush(run);
    if (run.socket) run.socket.close();
  }
}

export default function (component) {
  const { parentElement, data } = component;
  const root = parentElement.querySelector('.ser-live');
  const known = sessions.get(root);
  const session = known || new Session(root);
  session.data = data;
  if (!known) {
    sessions.set(root, session);
    session.start();
  }
  return () => {
    sessions.delete(root);
    const run = session.running;
    session.running = null;
    if (run) session.release(run);
  };
}
