"""What comes from outside, checked: flags, JSON files, folders of strangers, the network. Every mistake is one line."""
