"""One module per op: its cases, its hand-computed example, its error cases. Each defines SPECS."""
