"""New training rows from a task's own: paraphrases by a language model, repairs, and simple changes without one."""
