"""Models of sfumato's zoo that its wheel leaves out: few-step students, studies, medical models; ``sf.load`` finds them by name."""
