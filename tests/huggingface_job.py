"""Load checkpoints of transformers in a process of its own: with decomp, or with transformers alone.

    python huggingface_job.py with|without FOLDER...

Each folder holds a checkpoint, its inputs and the name of an Auto class. With decomp, the outputs and what
transformers says of the keys are written beside them; without it, the class and text of the error, if any.
"""

import json
import sys
from pathlib import Path

import torch
import transformers

WITH = sys.argv[1] == "with"
if WITH:
    import decomp.huggingface

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
for folder in map(Path, sys.argv[2:]):
    kind = getattr(transformers, (folder / "auto.txt").read_text())
    inputs = torch.load(folder / "inputs.pt")
    try:
        model, info = kind.from_pretrained(folder, output_loading_info=True)
    except Exception as error:
        if WITH:
            raise
        (folder / "error.json").write_text(json.dumps([type(error).__name__, str(error)]))
        continue
    with torch.no_grad():
        outputs = model(**inputs)[0]
    keys = {name: sorted(map(str, each)) for name, each in info.items()}
    torch.save({"outputs": outputs, "keys": keys}, folder / "loaded.pt")
    if WITH:
        decomp.huggingface.from_pretrained(folder)
