"""llama.cpp's own converter, told to take any tokenizer for Qwen2's.

`SOURCE_DIR` and the converter's arguments. It refuses tokenizers that it does not know by a digest,
and ours is random; prompts and answers are token ids here, so that its text does not matter. Runs
in the peer's environment.
"""

import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    source = Path(sys.argv[1])
    sys.path[:0] = [str(source), str(source / "gguf-py")]
    sys.argv = sys.argv[1:]
    from conversion.base import TextModel

    TextModel.get_vocab_base_pre = lambda _model, _tokenizer: "qwen2"
    runpy.run_path(str(source / "convert_hf_to_gguf.py"), run_name="__main__")
