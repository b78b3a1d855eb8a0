//JAVA 17+
//SOURCES Server.java

import java.io.BufferedReader;
import java.io.IOException;
import java.util.Map;

/** What test/demo runs: the hook as JBang starts it, with its log as text. */
class Demo {

    private static final int BUILD_MS = 5000;

    public static void main(String... args) throws IOException, InterruptedException {
        try (Server buildkitd = Server.start(); Server.Connection client = buildkitd.connect()) {
            System.out.println("A client builds on port " + buildkitd.port() + ". Now its pod is deleted.");
            ProcessBuilder builder = new ProcessBuilder("test/jbang", "buildkit-prestop.java");
            builder.redirectErrorStream(true).environment().putAll(Map.of("BUILDKITD_PORT", "" + buildkitd.port(),
                    "BUILDKITD_SOCKET", "", "LOG_FORMAT", "text"));
            Process hook = builder.start();
            Runtime.getRuntime().addShutdownHook(new Thread(hook::destroy));
            try (BufferedReader log = hook.inputReader()) {
                for (String line; (line = log.readLine()) != null; ) {
                    System.out.println(line);
                    if (line.contains("1 connection ")) {
                        Thread.sleep(BUILD_MS);
                        System.out.println("The build has ended.");
                        client.close();
                    }
                }
            }
            System.out.println("The hook exits with " + hook.waitFor() + ". Now buildkitd gets its SIGTERM.");
            System.exit(hook.exitValue());
        }
    }
}
