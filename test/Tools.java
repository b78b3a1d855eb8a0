import java.io.File;
import java.io.IOException;
import java.io.Reader;
import java.io.UncheckedIOException;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import java.nio.file.attribute.PosixFilePermissions;
import java.util.ArrayList;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;
import java.util.Properties;
import java.util.stream.Stream;
import org.junit.jupiter.api.Assumptions;

/** The commands that a test needs beside the JDK. Where one is not installed, the test is skipped and says so. */
final class Tools {

    /** The home directory. Java itself takes the user database's, whatever HOME says. */
    static final String HOME = System.getenv().getOrDefault("HOME", System.getProperty("user.home"));

    /** Where test/jbang keeps JBang. */
    static final Path JBANG_DIR = Path.of(System.getenv().getOrDefault("JBANG_DIR", HOME + "/.jbang"));

    private Tools() {
    }

    /** Where the command is; aborts the test where it is not installed. */
    static Path require(String command) {
        Path found = Stream.of(System.getenv("PATH").split(":"))
                .map(directory -> Path.of(directory, command).toAbsolutePath())
                .filter(file -> Files.isExecutable(file) && !Files.isDirectory(file))
                .findFirst().orElse(null);
        Assumptions.assumeTrue(found != null, "needs the command " + command);
        return found;
    }

    /**
     * Makes the directory hold nothing but links with these names to these commands, to be a hook's whole PATH. BusyBox
     * becomes the command whose name the link has.
     */
    static String only(Path emptyDirectory, Map<String, Path> links) {
        try {
            Files.createDirectories(emptyDirectory);
            for (Map.Entry<String, Path> link : links.entrySet()) {
                Files.createSymbolicLink(emptyDirectory.resolve(link.getKey()), link.getValue());
            }
        } catch (IOException e) {
            throw new UncheckedIOException(e);
        }
        return emptyDirectory.toString();
    }

    /**
     * Writes a shell script that stands for a command, or replaces it in one step. A shell writes it: a file that this
     * process had open for writing could still be open in a child that it starts meanwhile, and then cannot be run.
     */
    static void stub(Path file, String script) {
        if (!succeeds("sh", "-c", "printf '#!/bin/sh\\n%s' \"$2\" >\"$1\" && chmod 755 \"$1\" && mv \"$1\" \"$0\"",
                file.toString(), file + ".new", script)) {
            throw new IllegalStateException("cannot write " + file);
        }
    }

    /** Aborts the test where it may not make namespaces or become another user. */
    static void requireRoot() {
        require("unshare");
        require("setpriv");
        Assumptions.assumeTrue(succeeds("unshare", "--mount", "--net", "--pid", "--fork",
                "setpriv", "--reuid", "65534", "--clear-groups", "true"),
                "needs root that may make namespaces (unshare) and change users (setpriv)");
    }

    /** The start of a command that becomes an unprivileged user. */
    static List<String> nobody() {
        return List.of(require("setpriv").toString(), "--reuid", "65534", "--regid", "65534", "--clear-groups");
    }

    /** Hook.javaCommand() for any user and any place: its jars copied to a directory that everybody can read. */
    static List<String> javaCommandForEveryone(Path directory) {
        try {
            Files.createDirectories(directory);
            openToEveryone(directory);
            List<String> command = new ArrayList<>(Hook.javaCommand());
            int classpath = command.indexOf("-cp") + 1;
            List<String> copies = new ArrayList<>();
            for (String jar : command.get(classpath).split(":")) {
                Path copy = directory.resolve(Path.of(jar).getFileName());
                Files.copy(Path.of(jar), copy);
                Files.setPosixFilePermissions(copy, PosixFilePermissions.fromString("rw-r--r--"));
                copies.add(copy.toString());
            }
            command.set(classpath, String.join(":", copies));
            Assumptions.assumeTrue(succeeds("setpriv", "--reuid", "65534", "--clear-groups",
                    "test", "-x", command.get(0)), "needs a JDK that every user may run");
            return command;
        } catch (IOException e) {
            throw new UncheckedIOException(e);
        }
    }

    /** Copies what JBang and test/jbang fetch for the script, so that a test needs no network: JBang and picocli. */
    static void copyFetched(Path jbangDirectory, Path repository) {
        Path picocli = picocli().getParent();
        Path version = repository.resolve("info/picocli/picocli").resolve(picocli.getFileName());
        try {
            Files.createDirectories(jbangDirectory);
            Files.createDirectories(version);
            for (File file : JBANG_DIR.toFile().listFiles((directory, name) -> name.endsWith("-all.jar"))) {
                Files.copy(file.toPath(), jbangDirectory.resolve(file.getName()));
            }
            for (File file : picocli.toFile().listFiles()) {
                Files.copy(file.toPath(), version.resolve(file.getName()));
            }
        } catch (IOException e) {
            throw new UncheckedIOException(e);
        }
    }

    /** Picocli's jar, where JBang keeps it. */
    static Path picocli() {
        List<String> command = Hook.javaCommand();
        return Stream.of(command.get(command.size() - 2).split(":")).filter(jar -> jar.contains("picocli-"))
                .map(Path::of).findFirst().orElseThrow();
    }

    /** Lets every user read the directory. JUnit's temporary directories are their owner's alone. */
    static void openToEveryone(Path directory) {
        try {
            Files.setPosixFilePermissions(directory, PosixFilePermissions.fromString("rwxr-xr-x"));
        } catch (IOException e) {
            throw new UncheckedIOException(e);
        }
    }

    /** The JDK that runs this, and then those installed beside it that are not too old, by version. */
    static Map<String, Path> jdks() {
        Map<String, Path> jdks = new LinkedHashMap<>();
        Path own = Path.of(System.getProperty("java.home"));
        jdks.put(System.getProperty("java.version"), own);
        try (Stream<Path> beside = Files.list(own.toRealPath().getParent())) {
            for (Path jdk : beside.filter(jdk -> Files.isExecutable(jdk.resolve("bin/javac"))
                    && Files.exists(jdk.resolve("release"))).toList()) {
                Properties release = new Properties();
                try (Reader file = Files.newBufferedReader(jdk.resolve("release"))) {
                    release.load(file);
                }
                String version = release.getProperty("JAVA_VERSION").replace("\"", "");
                if (version.matches("(1[7-9]|[2-9]\\d)\\b.*")) {
                    jdks.putIfAbsent(version, jdk);
                }
            }
        } catch (IOException e) {
            throw new UncheckedIOException(e);
        }
        return jdks;
    }

    /** Whether the process runs; one that has ended and was not waited for does not. */
    static boolean running(long pid) {
        try {
            String stat = Files.readString(Path.of("/proc", String.valueOf(pid), "stat"), StandardCharsets.ISO_8859_1);
            return stat.charAt(stat.lastIndexOf(')') + 2) != 'Z';
        } catch (IOException e) {
            return false;
        }
    }

    /** Ends those of the processes that still run. */
    static void end(Stream<Long> pids) {
        pids.filter(Tools::running).forEach(pid -> ProcessHandle.of(pid).ifPresent(ProcessHandle::destroyForcibly));
    }

    private static boolean succeeds(String... command) {
        return Hook.run(List.of(command), Map.of()).exitCode() == 0;
    }
}
