"""Operations on the big tensors: each a public function with a torch twin and, where it pays, a Triton kernel."""
