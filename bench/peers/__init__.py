"""What others do: packages called as their users call them, and papers' loops written anew from the formulas."""
