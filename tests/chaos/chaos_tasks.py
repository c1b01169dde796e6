"""The tasks of jobs under fire: every kind of request, and a metric whose standard error is bootstrapped."""

from __future__ import annotations

from pathlib import Path

from service import write_task_files

DOCUMENTS = 2000
TASKS = ("chaos_choice", "chaos_words", "chaos_story")

_BODIES = {
    "chaos_choice": """
output_type: multiple_choice
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_choice: ["yes", "no"]
doc_to_target: gold
metric_list:
  - metric: acc
""",
    "chaos_words": """
output_type: loglikelihood
doc_to_text: "He asked me"
doc_to_target: " {{question}}"
metric_list:
  - metric: perplexity
  - metric: acc
""",
    "chaos_story": """
output_type: generate_until
doc_to_text: "Tell me: {{question}}"
doc_to_target: "x"
generation_kwargs:
  until: ["never to be said"]
  max_gen_toks: 24
  do_sample: false
metric_list:
  - metric: exact_match
""",
}


def write_chaos_tasks(folder: Path) -> Path:
    """TASKS and their data."""
    return write_task_files(folder, _BODIES, DOCUMENTS)
