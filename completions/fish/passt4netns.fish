# fish completion of passt4netns: that of pasta
complete -c passt4netns -w pasta
