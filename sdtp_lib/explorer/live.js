// Once per page. Pointing at a token of a live text fills the line above it; selecting text writes the token range
// into the explorer's "protect" box (the widget whose class is <prefix>protect), as if it had been typed there.
(() => {
  if (window.sdtpExplorer) return;
  window.sdtpExplorer = true;
  document.addEventListener('pointerover', event => {
    const token = event.target.closest?.('.sdtp .live .t');
    if (!token) return;
    const info = token.closest('.sdtp').querySelector('.info');
    const remark = getComputedStyle(token).getPropertyValue('--remark').trim().replace(/^["']|["']$/g, '');
    info.textContent = `“${token.textContent.trim() || '␣'}” · ${remark} · ${token.dataset.i}`;
  });
  document.addEventListener('pointerup', () => setTimeout(() => {
    const selection = getSelection();
    if (!selection.rangeCount || selection.isCollapsed) return;
    const range = selection.getRangeAt(0);
    const start = range.startContainer.parentElement?.closest('.sdtp .live');
    if (!start) return;
    const tokens = [...start.querySelectorAll('.t')].filter(token => range.intersectsNode(token));
    const prefix = start.dataset.prefix, box = document.querySelector(`.${prefix}protect input`);
    if (!tokens.length || !box || box.disabled) return;
    const [first, last] = [tokens[0], tokens.at(-1)].map(token => token.id.slice(prefix.length));
    box.value = [box.value.trim(), `${first}-${last}`].filter(Boolean).join(', ');
    box.dispatchEvent(new Event('input', {bubbles: true}));
    box.dispatchEvent(new Event('change', {bubbles: true}));
  }));
})();
