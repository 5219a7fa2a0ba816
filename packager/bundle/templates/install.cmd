@echo off
rem Installs this bundle; needs no network. Usage: install.cmd [--prefix DIR]
setlocal
set "prefix=%LOCALAPPDATA%\@BUNDLE@"
if "%~1"=="--prefix" set "prefix=%~2"
py -3 -I -B -c "import sys; sys.path.insert(0, sys.argv.pop(1)); from runtimes.install.install import main; sys.exit(main())" "%~dp0runtime" --bundle "%~dp0." --prefix "%prefix%"
