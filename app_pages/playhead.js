// Time lines: a click on a part plays the recording from there; a line shows the position.
if (!window.serPlayhead) {
  window.serPlayhead = true;
  const player = () => document.querySelector('audio');
  const show = () => {
    const audio = player();
    for (const line of document.querySelectorAll('.ser-time')) {
      const share = audio ? audio.currentTime / Number(line.dataset.duration) : 0;
      for (const head of line.querySelectorAll('.head')) {
        head.style.left = `${100 * Math.min(share, 1)}%`;
        head.style.display = audio && audio.currentTime > 0 ? 'block' : 'none';
      }
    }
  };
  const follow = () => {
    show();
    if (player() && !player().paused) requestAnimationFrame(follow);
  };
  for (const event of ['play', 'seeked', 'timeupdate', 'pause']) document.addEventListener(event, follow, true);
  document.addEventListener('click', (event) => {
    const part = event.target.closest && event.target.closest('.ser-time [data-start]');
    if (!part || !player()) return;
    player().currentTime = Number(part.dataset.start);
    player().play();
  });
}
