from lorashrink.cli import main

main()
