"""The lab's commands: each is a Result, the function that makes it, its pictures, its words and its flags."""
