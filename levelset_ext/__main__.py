from levelset_ext.cli import main

raise SystemExit(main())
