"""What leaves a run for other programs and for people: contact sheets and turntables."""
