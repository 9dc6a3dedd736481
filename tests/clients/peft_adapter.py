"""Save an adapter for a model, and the model with it merged: `python peft_adapter.py FOLDER ADAPTER MERGED`."""

import json
import sys


def main() -> None:
    import peft
    import torch
    import transformers

    folder, adapter, merged = sys.argv[1:]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    settings = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    tuned = peft.get_peft_model(model, settings)
    tuned.save_pretrained(adapter)
    with torch.no_grad():
        logits = tuned(torch.arange(8)[None]).logits[0, -1]
    tuned.merge_and_unload().save_pretrained(merged)
    print("\n" + json.dumps({"logits": logits.tolist()}))


if __name__ == "__main__":
    main()
