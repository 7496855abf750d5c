"""What methods are made of, each shared by several of them: locate, contexts, target, moments, solve."""
