() => {
  // colours: those that were chosen here, else those of ?__theme= or the system (Gradio's own way)
  const asked = new URLSearchParams(location.search).get('__theme');
  const chosen = localStorage.getItem('imgadapt-colours');
  if (!asked && chosen) document.body.classList.toggle('dark', chosen === 'dark');
  window.iaColours = () => {
    const dark = document.body.classList.toggle('dark');
    localStorage.setItem('imgadapt-colours', dark ? 'dark' : 'light');
  };

  // the form is kept from the moment on at which it was brought back
  let ready = false;
  window.iaReady = () => {
    ready = true;
    document.body.dataset.ready = 'yes';
    history.replaceState(null, '', location.pathname + (asked ? `?__theme=${encodeURIComponent(asked)}` : ''));  // a link is followed once; a reload brings back what was set since
  };
  window.iaKept = (version, names, values) => {
    const before = JSON.parse(window.iaLast || '{}');
    if (!ready) return before;
    const kept = {version, values: Object.fromEntries(names.map((name, at) => [name, values[at]]))};
    window.iaLast = JSON.stringify(kept);
    return kept;
  };

  // what was being drawn, to be told of when the server was started anew meanwhile
  window.iaDrawing = (id) => { sessionStorage.setItem('imgadapt-drawing', id || ''); };
  window.iaDrawn = () => {
    const id = sessionStorage.getItem('imgadapt-drawing') || '';
    sessionStorage.removeItem('imgadapt-drawing');
    return id;
  };

  window.iaTab = (chosen, before) => ready ? chosen : before;  // (the first tab is chosen by Gradio, not by anyone)

  document.addEventListener('keydown', (event) => {
    const press = (id) => {
      const button = document.getElementById(id);
      const there = button && !button.disabled && button.offsetParent !== null;
      if (there) button.click();
      return there;
    };
    if (event.key === 'Enter' && (event.ctrlKey || event.metaKey)) {
      if (document.activeElement && document.activeElement.blur) document.activeElement.blur();
      if (press('generate')) event.preventDefault();
    } else if (event.key === 'Escape') {
      press('stop');
    }
  });
}
