"""llama.cpp in a child process of ours: started, watched, told which slot is to read what."""
