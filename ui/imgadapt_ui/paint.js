// paints over a picture; what is painted goes to /pictures as a mask (white where painted), and its id is told
const INK = '#22897b', PAUSE = 250, BACK = 12;
let canvas = null, pen = null, last = null, erases = false, history = [], timer = 0, sending = false, again = false;

const say = (text) => { const line = element.querySelector('[role=status]'); if (line) line.textContent = text; };
const brush = () => Number(element.querySelector('input').value) / 100 * Math.max(canvas.width, canvas.height);
const share = (data) => { let n = 0; for (let i = 3; i < data.length; i += 4) if (data[i] > 127) n++; return 4 * n / data.length; };
const told = (painted) => say(painted ? `${Math.max(1, Math.round(100 * painted))} % of the picture is redrawn` : 'Nothing is painted: the whole picture is redrawn');

const begin = () => {
  const box = element.querySelector('.ia-paint');
  if (!box || box.dataset.begun) return;
  box.dataset.begun = 'yes';
  canvas = box.querySelector('canvas'); pen = canvas.getContext('2d', {willReadFrequently: true});
  history = []; erases = false; told(0);
  if (!box.dataset.mask) return;
  const mask = new Image();
  mask.onload = () => {  // white becomes ink
    pen.drawImage(mask, 0, 0, canvas.width, canvas.height);
    const found = pen.getImageData(0, 0, canvas.width, canvas.height), data = found.data;
    for (let i = 0; i < data.length; i += 4) { data[i + 3] = data[i] > 127 ? 255 : 0; data[i] = 34; data[i + 1] = 137; data[i + 2] = 123; }
    pen.putImageData(found, 0, 0);
    told(share(data));
  };
  mask.src = '/pictures/' + box.dataset.mask;
};

const send = async () => {
  if (sending) { again = true; return; }
  sending = true;
  const box = element.querySelector('.ia-paint');
  try {
    do {
      again = false;
      const found = pen.getImageData(0, 0, canvas.width, canvas.height), data = found.data, painted = share(data);
      let id = '';
      if (painted) {
        for (let i = 0; i < data.length; i += 4) { data[i] = data[i + 1] = data[i + 2] = data[i + 3] > 127 ? 255 : 0; data[i + 3] = 255; }
        const mask = document.createElement('canvas');
        mask.width = canvas.width; mask.height = canvas.height;
        mask.getContext('2d').putImageData(found, 0, 0);
        const file = await new Promise((done) => mask.toBlob(done, 'image/png'));
        const answer = await fetch('/pictures', {method: 'POST', body: file}), made = await answer.json();
        if (!answer.ok) throw new Error(made.error);
        id = made.id;
      }
      if (element.querySelector('.ia-paint') !== box) return;  // of another picture
      told(painted);
      trigger('select', {mask: id, of: box.dataset.picture});
    } while (again);
  } catch (error) {
    say(`The mask could not be kept: ${error.message}; paint once more`);
  } finally {
    sending = false;
  }
};
const soon = () => { clearTimeout(timer); timer = setTimeout(send, PAUSE); say('Keeping the mask ...'); };

const place = (event) => {
  const box = canvas.getBoundingClientRect();
  return [(event.clientX - box.left) / box.width * canvas.width, (event.clientY - box.top) / box.height * canvas.height];
};
const line = (from, to) => {
  pen.globalCompositeOperation = erases ? 'destination-out' : 'source-over';
  pen.strokeStyle = INK; pen.lineWidth = Math.max(brush(), 1); pen.lineCap = pen.lineJoin = 'round';
  pen.beginPath(); pen.moveTo(...from); pen.lineTo(...to); pen.stroke();
};
const keep = () => { history.push(pen.getImageData(0, 0, canvas.width, canvas.height)); if (history.length > BACK) history.shift(); };

element.addEventListener('pointerdown', (event) => {
  if (event.target !== canvas || event.button) return;
  event.preventDefault(); canvas.setPointerCapture(event.pointerId); clearTimeout(timer);
  keep(); last = place(event); line(last, last);
});
element.addEventListener('pointermove', (event) => { if (last) { const now = place(event); line(last, now); last = now; } });
for (const end of ['pointerup', 'pointercancel']) element.addEventListener(end, () => { if (last) { last = null; soon(); } });
element.addEventListener('click', (event) => {
  const button = event.target.closest('[data-do]');
  if (!button || !canvas) return;
  const todo = button.dataset.do;
  if (todo === 'erase') { erases = !erases; button.setAttribute('aria-pressed', erases); return; }
  if (todo === 'undo') { if (!history.length) return say('There is nothing to undo'); pen.putImageData(history.pop(), 0, 0); }
  if (todo === 'clear') { keep(); pen.clearRect(0, 0, canvas.width, canvas.height); }
  if (todo === 'all') { keep(); pen.globalCompositeOperation = 'source-over'; pen.fillStyle = INK; pen.fillRect(0, 0, canvas.width, canvas.height); }
  soon();
});

begin();
new MutationObserver(begin).observe(element, {childList: true, subtree: true});
