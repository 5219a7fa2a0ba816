"""The folder that is copied to a box: its manifest, wheels, installer, assembly and verification, one file each."""
