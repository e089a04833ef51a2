"""Load checkpoints of transformers in a process of its own: with decomp, or with transformers alone.

    python huggingface_job.py with|without FOLDER...

Each folder holds a checkpoint, its inputs and the name of an Auto class. With decomp, the outputs and what
transformers says of the keys are written beside them; without it, the class and text of the error, if any.
"""

import importlib
import json
import sys
from pathlib import Path

import torch
import transformers


def load(folder, ours):
    kind = getattr(transformers, (folder / "auto.txt").read_text())
    try:
        model, info = kind.from_pretrained(folder, output_loading_info=True)
    except Exception as error:
        if ours:
            raise
        (folder / "error.json").write_text(json.dumps([type(error).__name__, str(error)]))
        return
    with torch.no_grad():
        outputs = model(**torch.load(folder / "inputs.pt"))[0]
    keys = {name: sorted(map(str, each)) for name, each in info.items()}
    torch.save({"outputs": outputs, "keys": keys}, folder / "loaded.pt")
    if ours:
        ours.from_pretrained(folder)


if __name__ == "__main__":
    ours = importlib.import_module("decomp.huggingface") if sys.argv[1] == "with" else None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for folder in map(Path, sys.argv[2:]):
        load(folder, ours)
