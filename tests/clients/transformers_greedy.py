"""Continue prompts in transformers: `python transformers_greedy.py FOLDER '["prompt", ...]' TOKENS [DTYPE]`."""

import json
import sys


def main() -> None:
    import torch
    import transformers

    folder, prompts, tokens = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
    dtype = sys.argv[4] if len(sys.argv) > 4 else "float32"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    model.generation_config.eos_token_id = None  # the text goes on behind its end, as the other programs' does
    found = {"ids": [], "scores": [], "prompts": [], "texts": []}
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt")
        output = model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=tokens,
            output_logits=True,
            return_dict_in_generate=True,
        )
        new = output.sequences[0, inputs.input_ids.shape[1] :]
        scores = torch.cat(output.logits).log_softmax(-1).gather(1, new[:, None])[:, 0]
        found["ids"].append(new.tolist())
        found["scores"].append(scores.tolist())
        found["prompts"].append(inputs.input_ids[0].tolist())
        found["texts"].append(tokenizer.decode(new))
    talk = [{"role": "user", "content": "hi"}]
    found["chat"] = tokenizer.decode(tokenizer.apply_chat_template(talk, add_generation_prompt=True)["input_ids"])
    print("\n" + json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
