"""Fine-tune on chat messages with TRL, without writing a template: `python trl_sft.py FOLDER OUTPUT STEPS`."""

import json
import sys


def main() -> None:
    import datasets
    import transformers
    import trl

    folder, output, steps = sys.argv[1], sys.argv[2], int(sys.argv[3])
    talks = [
        {"messages": [{"role": "user", "content": f"What is {i} + 1?"}, {"role": "assistant", "content": str(i + 1)}]}
        for i in range(8)
    ]
    settings = trl.SFTConfig(
        output_dir=f"{output}.work",
        max_steps=steps,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        max_length=128,
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    trainer = trl.SFTTrainer(model=model, args=settings, train_dataset=datasets.Dataset.from_list(talks))
    trainer.train()
    trainer.save_model(output)
    text = trainer.processing_class.decode(trainer.train_dataset[0]["input_ids"])
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    print("\n" + json.dumps({"text": text, "losses": losses, "eos": trainer.model.generation_config.eos_token_id}))


if __name__ == "__main__":
    main()
