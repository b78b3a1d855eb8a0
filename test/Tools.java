import static org.junit.jupiter.api.Assertions.assertDoesNotThrow;
import static org.junit.jupiter.api.Assertions.assertTrue;
import static org.junit.jupiter.api.Assumptions.assumeTrue;

import java.io.*;
import java.nio.charset.StandardCharsets;
import java.nio.file.*;
import java.util.*;
import java.util.stream.Stream;

/** The commands that a test needs beside the JDK. Where one is not installed, the test is skipped and says so. */
final class Tools {

    /** The home directory. Java itself takes the user database's, whatever HOME says. */
    static final String HOME = System.getenv().getOrDefault("HOME", System.getProperty("user.home"));

    /** Where test/jbang keeps JBang. */
    static final Path JBANG_DIR = Path.of(System.getenv().getOrDefault("JBANG_DIR", HOME + "/.jbang"));

    private Tools() { }

    /** Where the command is; aborts the test where it is not installed. */
    static Path require(String command) {
        Optional<Path> found = find(command, System.getenv("PATH")).findFirst();
        assumeTrue(found.isPresent(), "needs the command " + command);
        return found.get();
    }

    /** The commands of this name on a path such as /usr/bin:/bin. */
    static Stream<Path> find(String command, String path) {
        return Stream.of(path.split(":")).map(directory -> Path.of(directory, command).toAbsolutePath())
                .filter(file -> Files.isExecutable(file) && !Files.isDirectory(file));
    }

    /**
     * Makes the directory hold nothing but links with these names to these commands, to be a hook's whole PATH. BusyBox
     * becomes the command whose name the link has.
     */
    static String only(Path emptyDirectory, Map<String, Path> links) {
        assertDoesNotThrow(() -> Files.createDirectories(emptyDirectory));
        links.forEach((name, command) ->
                assertDoesNotThrow(() -> Files.createSymbolicLink(emptyDirectory.resolve(name), command)));
        return emptyDirectory.toString();
    }

    /**
     * Writes a shell script that stands for a command, or replaces it in one step. A shell writes it: a file that this
     * process had open for writing could still be open in a child that it starts meanwhile, and then cannot be run.
     */
    static void stub(Path file, String script) {
        assertTrue(succeeds("sh", "-c",
                "printf '#!/bin/sh\\n%s' \"$2\" >\"$1\" && chmod 755 \"$1\" && mv \"$1\" \"$0\"",
                file.toString(), file + ".new", script), "cannot write " + file);
    }

    /** Aborts the test where it may not make namespaces or become another user. */
    static void requireRoot() {
        require("unshare");
        require("setpriv");
        assumeTrue(succeeds("unshare", "--mount", "--net", "--pid", "--fork",
                "setpriv", "--reuid", "65534", "--clear-groups", "true"),
                "needs root that may make namespaces (unshare) and change users (setpriv)");
    }

    /** The start of a command that becomes an unprivileged user. */
    static List<String> nobody() {
        return List.of(require("setpriv").toString(), "--reuid", "65534", "--regid", "65534", "--clear-groups");
    }

    /** Hook.javaCommand() for any user and any place: its jars copied to a directory that everybody can read. */
    static List<String> javaCommandForEveryone(Path directory) {
        List<String> command = new ArrayList<>(Hook.javaCommand());
        assumeTrue(succeeds("setpriv", "--reuid", "65534", "--clear-groups", "test", "-x", command.get(0)),
                "needs a JDK that every user may run");
        int classpath = command.indexOf("-cp") + 1;
        Stream.of(command.get(classpath).split(":")).map(Path::of)
                .forEach(jar -> copy(jar.getParent(), jar.getFileName().toString(), directory));
        openToEveryone(directory);
        command.set(classpath, directory + "/*");
        return command;
    }

    /** Copies what JBang and test/jbang fetch for the script, so that a test needs no network: JBang and picocli. */
    static void copyFetched(Path jbangDirectory, Path repository) {
        Path version = picocli().getParent();
        copy(JBANG_DIR, "*-all.jar", jbangDirectory);
        copy(version, "*", repository.resolve("info/picocli/picocli").resolve(version.getFileName()));
    }

    /** Copies what JBang has made of the script, so that it does not compile it again there. */
    static void copyCompiled(Path jbangDirectory) {
        List<String> command = Hook.javaCommand();
        Path compiled = Path.of(command.get(command.size() - 2).split(":")[0]).getParent();
        copy(compiled, "*", jbangDirectory.resolve("cache/jars").resolve(compiled.getFileName()));
    }

    private static void copy(Path from, String glob, Path to) {
        assertDoesNotThrow(() -> {
            Files.createDirectories(to);
            try (DirectoryStream<Path> files = Files.newDirectoryStream(from, glob)) {
                for (Path file : files) {
                    Files.copy(file, to.resolve(file.getFileName()));
                }
            }
        });
    }

    /** Picocli's jar, where JBang keeps it. */
    static Path picocli() {
        List<String> command = Hook.javaCommand();
        return Stream.of(command.get(command.size() - 2).split(":")).filter(jar -> jar.contains("picocli-"))
                .map(Path::of).findFirst().orElseThrow();
    }

    /** Lets every user read the directory and what is in it. JUnit's temporary directories are their owner's alone. */
    static void openToEveryone(Path directory) {
        assertTrue(succeeds("chmod", "-R", "a+rX", directory.toString()));
    }

    /** The JDK that runs this, and then those installed beside it that are not too old, by version. */
    static Map<String, Path> jdks() {
        Map<String, Path> jdks = new LinkedHashMap<>();
        Path own = Path.of(System.getProperty("java.home"));
        jdks.put(System.getProperty("java.version"), own);
        assertDoesNotThrow(() -> {
            try (DirectoryStream<Path> beside = Files.newDirectoryStream(own.toRealPath().getParent(), Tools::isJdk)) {
                for (Path jdk : beside) {
                    Properties release = new Properties();
                    release.load(new StringReader(Files.readString(jdk.resolve("release"))));
                    String version = release.getProperty("JAVA_VERSION").replace("\"", "");
                    if (version.matches("(1[7-9]|[2-9]\\d)\\b.*")) {
                        jdks.putIfAbsent(version, jdk);
                    }
                }
            }
        });
        return jdks;
    }

    private static boolean isJdk(Path directory) {
        return Files.isExecutable(directory.resolve("bin/javac")) && Files.exists(directory.resolve("release"));
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
