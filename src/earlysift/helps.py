"""What the command line says about itself: the overview of ``earlysift --help``, and the text of every command.

It imports nothing, so that the overview is there at once and needs no package.
"""

SUMMARY = "Train faster by back-propagating only the samples that matter, and prove that it paid."
SHELLS = ("bash", "zsh")
COMMANDS = {
    "compare": """Train the same model under several arms on equal budgets, and report which reached the target first.

Examples:

  earlysift compare                                # a 12-layer BERT on the text of Python's standard library

  earlysift compare --seeds 3 --out runs/three     # evidence needs three seeds or more

  earlysift compare --data wikitext-2/ --budget 200 --seeds 3 --out runs/wikitext

  earlysift compare --task classification --data reviews.tsv --arms uniform,sift,rho-loss,auto

  earlysift compare --suite cpu --data corpora/ --jobs 2 --out runs/cpu --resume    # all workloads, all arms

  earlysift compare --config my.toml --resume""",
    "pretrain": """Train a model from random weights on the samples that matter, resumable bit for bit.

Exit codes: 0 done (target reached, or none given); 1 target not reached; 2 bad input; 3 loss not finite (the last good
checkpoint remains); 4 disk full (likewise); 130 stopped by SIGTERM, SIGHUP, SIGUSR1 or Ctrl-C (saved; continue with
--resume).

Examples:

  earlysift pretrain --preset bert-base --data wikipedia.txt books.txt --target-accuracy 0.64 --arm sift --depth 1

  earlysift pretrain --preset bert-tiny --data notes/ --tokenizer vocab.txt --minutes 60 --out runs/tiny

  earlysift pretrain --config runs/tiny/config.json --resume

  earlysift pretrain --data Salesforce/wikitext:wikitext-103-raw-v1 --stream --whole-word

  torchrun --nproc-per-node 8 -m earlysift pretrain --preset bert-base --data wikipedia.txt --accumulate 1

Presets: {built_in}; or a transformers config.json.""",
    "report": """Draw the figures and the self-contained HTML page of run folders again.

Examples:

  earlysift report runs/compare

  earlysift report runs/cpu/mnist runs/cpu/clinc --out both.html     # one page of both""",
    "check": """Before training: the cost of scoring on this machine, and the gain from which selection pays.

Builds the model with random weights and prints a table: a training step, and scoring a pool at every depth. An unknown
model family is described in the config: "earlysift_family": {{"layers": "model.layers", "heads": [["lm_head"]]}}.

Examples:

  earlysift check bert-base --batch 8               # built in: {built_in}

  earlysift check my_model/config.json --seq-length 256 --depths 1 2 4

  earlysift check my_model/ --task sequence_classification --json check.json""",
    "theory": """Test the theory of selection on convex problems and linear networks.

Takes about two minutes on two cores and downloads nothing. Prints bound, measured value and ratio; writes theory.html,
theory.json and a picture of each experiment. Experiments: {experiments}; all if none is named.

Examples:

  earlysift theory                                  # everything, into runs/theory

  earlysift theory crossing floor --seed 1 --out runs/floor

  earlysift theory payoff --results benchmarks/results    # draws measured workloads into the payoff map""",
}
"""Command to its help; the first line stands in the overview. ``{built_in}`` and ``{experiments}`` are filled in."""
OPTIONS = {
    "-h, --help": "this text; `earlysift COMMAND --help` has all options and examples",
    "--version": "versions of earlysift, torch, transformers and Python, and the commit of a checkout",
    "--print-completion SHELL": f"completion for {', '.join(SHELLS)}: source <(earlysift --print-completion bash)",
}


def overview() -> str:
    """The text of ``earlysift --help``."""
    lines = {name: text.partition("\n")[0] for name, text in COMMANDS.items()}
    return "\n\n".join(
        ("usage: earlysift COMMAND [OPTIONS]", SUMMARY, _listed("commands", lines), _listed("options", OPTIONS))
    )


def _listed(title: str, lines: dict[str, str]) -> str:
    width = max(map(len, lines))
    return "\n".join((f"{title}:", *(f"  {name:{width}}  {line}" for name, line in lines.items())))
