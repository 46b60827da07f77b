// What an open lesson shows of itself: its figures, its marked tokens, and in `wrong` what a reader
// would not see: a figure that is not drawn, an output that is cut off at the side, text whose
// contrast with the ground is below 4.5 (WCAG 2.2, 1.4.3).
() => {
  const light = colour => { // relative luminance; null where nothing is painted
    const [r, g, b, alpha] = colour.match(/[\d.]+/g).map(Number);
    const [R, G, B] = [r, g, b].map(v => v / 255)
      .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return alpha === 0 ? null : 0.2126 * R + 0.7152 * G + 0.0722 * B;
  };
  const behind = element => {
    for (let one = element; one; one = one.parentElement) {
      const found = light(getComputedStyle(one).backgroundColor);
      if (found !== null) return found;
    }
    return 1;
  };
  const wrong = [], figures = [], tokens = [];
  for (const cell of document.querySelectorAll('.jp-Notebook .jp-Cell')) {
    const index = cell.dataset.windowedListIndex;
    const say = what => wrong.push(`cell ${index}: ${what}`);
    const all = selector => [...cell.querySelectorAll(selector)];
    all('.jp-OutputArea img').forEach((image, i) => {
      if (image.complete && image.naturalWidth > 0) figures.push(`${index} ${i}`);
      else say('a figure is not drawn');
    });
    all('code[style*="underline"]').forEach((_, i) => tokens.push(`${index} ${i}`));
    for (const one of all('.jp-OutputArea-output, .jp-MarkdownOutput')) {
      const scrolls = ['auto', 'scroll'].includes(getComputedStyle(one).overflowX);
      if (!scrolls && one.scrollWidth > one.clientWidth + 2)
        say(`${one.scrollWidth} pixels in a width of ${one.clientWidth}`);
    }
    const coloured = '.jp-OutputArea-output [style], .jp-MarkdownOutput *, .sft-prediction *';
    for (const one of all(coloured)) {
      if (!one.textContent.trim() || one.children.length || one.matches('style')) continue;
      const both = [light(getComputedStyle(one).color) ?? 0, behind(one)];
      const contrast = (Math.max(...both) + 0.05) / (Math.min(...both) + 0.05);
      if (contrast < 4.5)
        say(`"${one.textContent.slice(0, 30)}" has a contrast of ${contrast.toFixed(1)}`);
    }
  }
  return {wrong, figures, tokens};
}
