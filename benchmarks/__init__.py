"""Speed, memory and accuracy of gapkernels and of its peers: cases, one harness, pytest-benchmark suites, GPU run."""
