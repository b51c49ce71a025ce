"""Side-by-side measurements; each script writes JSON under benchmarks/results/."""
