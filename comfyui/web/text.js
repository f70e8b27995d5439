// Shows what a node says (its report, facts or advice) on the node itself.

import { app } from "../../scripts/app.js";
import { ComfyWidgets } from "../../scripts/widgets.js";

const NAME = "shown text";

function textWidget(node) {
  const present = node.widgets?.find((widget) => widget.name === NAME);
  if (present) return present;
  const { widget } = ComfyWidgets.STRING(node, NAME, ["STRING", { multiline: true }], app);
  // neither saved with the workflow nor sent to the server
  widget.serialize = false;
  widget.options.serialize = false;
  const element = widget.inputEl ?? widget.element;
  if (element) element.readOnly = true;
  return widget;
}

app.registerExtension({
  name: "lorashrink.text",
  beforeRegisterNodeDef(nodeType, nodeData) {
    if (nodeData.category !== "lorashrink") return;
    const before = nodeType.prototype.onExecuted;
    nodeType.prototype.onExecuted = function (output) {
      before?.apply(this, arguments);
      if (!output?.text) return;
      textWidget(this).value = output.text.join("\n");
      const needed = this.computeSize();
      this.setSize([Math.max(this.size[0], needed[0]), Math.max(this.size[1], needed[1])]);
      app.canvas.setDirty(true, true);
    };
  },
});
