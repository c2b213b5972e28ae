"""TRL's `SFTTrainer`: a small Llama learns to count on from where a row begins.

The run saves checkpoints. Run it again in the same folder with more steps, and it goes on from the last one.
"""

import argparse
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed
from transformers.trainer_utils import get_last_checkpoint
from trl import SFTConfig, SFTTrainer

from earlysift import SiftConfig
from earlysift.adapters.huggingface import SiftTrainerMixin


class SiftSFTTrainer(SiftTrainerMixin, SFTTrainer):
    """TRL's trainer, on the samples that are selected."""


def make_data():
    """Rows that count, modulo 90, of several lengths."""
    drawn = torch.randint(8, 20, (380, 2), generator=torch.Generator().manual_seed(0)).tolist()
    return Dataset.from_dict({"input_ids": [[5 + (7 * a + i) % 90 for i in range(b)] for a, b in drawn]})


def make_tokenizer():
    """A tokenizer whose words are numbers; the data is tokenized already, and only padding is needed."""
    words = models.WordLevel({str(i): i for i in range(100)}, unk_token="0")
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), pad_token="0", eos_token="1", unk_token="0")


def main():
    """Train, from the last checkpoint if there is one."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--accumulate", type=int, default=1, help="batches per step")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--keep", type=float, default=0.5, help="share of a pool that is trained on")
    args = parser.parse_args()

    set_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=100, hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64)
    )
    arguments = SFTConfig(
        "run",
        per_device_train_batch_size=8,
        gradient_accumulation_steps=args.accumulate,
        max_steps=args.steps,
        max_length=32,
        learning_rate=1e-3,
        lr_scheduler_type="constant",  # of no other number of steps, so that a run can be prolonged
        bf16=args.bf16,
        logging_steps=1,
        save_steps=5,
        report_to="none",
        use_cpu=True,
    )
    trainer = SiftSFTTrainer(
        model=model,
        args=arguments,
        train_dataset=make_data(),
        sift=SiftConfig(keep=args.keep, depth=1),
        processing_class=make_tokenizer(),
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint("run") if Path("run").exists() else None)


if __name__ == "__main__":
    main()
