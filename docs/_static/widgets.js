// Draws the widgets whose state a page carries, with the script that the ipywidgets wheel brings for the classic notebook
// (share/jupyter/nbextensions/jupyter-js-widgets/extension.js, copied beside this file). It expects a notebook around it, so it is given the
// outline of one: a kernel that knows no widget, and a notebook whose metadata is this page's state. Nothing is fetched from elsewhere.
(() => {
  const STATE = "application/vnd.jupyter.widget-state+json", VIEW = "application/vnd.jupyter.widget-view+json";
  const nothing = new Proxy(function () {}, { get: (_, key) => (key === Symbol.toPrimitive ? () => "" : nothing), apply: () => nothing });
  const state = document.querySelector(`script[type="${STATE}"]`);
  if (!state) return;

  const kernel = {
    is_connected: () => true, comm_info: (_, answer) => answer({ content: { comms: {} } }),
    comm_manager: { register_target() {}, new_comm(name, data, callbacks, metadata, id, buffers) { throw new Error("a page has no kernel"); } },
  };
  kernel.comm_manager.kernel = kernel;
  const notebook = { kernel, metadata: { widgets: { [STATE]: JSON.parse(state.textContent) } }, keyboard_manager: nothing, container: nothing, events: nothing,
                     get_cells() { draw(kernel.widget_manager); return []; } }; // asked for once the state is read
  window.Jupyter = { notebook, version: "6.5.0", notification_area: nothing, menubar: nothing };
  const modules = { "base/js/namespace": window.Jupyter, "base/js/events": nothing, "notebook/js/outputarea": { OutputArea: nothing } };
  notebook.keyboard_manager.actions; // any name below it is nothing as well

  async function draw(manager) {
    for (const script of document.querySelectorAll(`script[type="${VIEW}"]`)) {
      const host = document.createElement("div"), model = JSON.parse(script.textContent).model_id;
      host.className = "widget-host";
      script.after(host);
      if (!manager.has_model(model)) continue;
      const view = await manager.create_view(await manager.get_model(model));
      view.luminoWidget.constructor.attach(view.luminoWidget, host);
    }
    document.documentElement.dataset.widgets = "drawn";
  }

  const menu = document.createElement("ul"); // the script adds an entry to the menu beside #help_menu
  menu.hidden = true;
  menu.innerHTML = "<li><a id='help_menu'></a></li>";
  document.body.append(menu);
  window.requirejs = (names, found) => found && found(...names.map(n => modules[n] || nothing));
  window.requirejs.config = () => {};
  window.define = (_, make) => { make({ id: "widgets" }).load_ipython_extension(); delete window.define; };
  const script = document.createElement("script");
  script.src = new URL("ipywidgets.js", document.currentScript.src);
  document.body.append(script);
})();
